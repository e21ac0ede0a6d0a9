"""KServe v2, `inference.GRPCInferenceService`, with the messages that tritonclient ships.

A generator takes `class_label` INT64 [B,1] or `prompt` BYTES [B,1] if it is conditional, `low_resolution` UINT8
[B,h,w,C] if it enlarges, and all else if the caller likes: `seed` UINT64 [B,1], without which a picture is that of
seed 0 and its place, `latents` FP32 [B,C,H,W], which are its first noise, `negative_prompt` BYTES [B,1],
`guidance_scale` FP32 [B,1], equal for all. It answers `images` UINT8 [B,H,W,C]. A scene takes `pose` FP32 [B,4,4] and
`intrinsics` FP32 [B,4] and answers `rgb` and `depth`; a picture is twice its principal point in size, unless the
parameters `width` and `height` say otherwise. What is called by its signature takes and answers what that names: see
`kserve.functions`. Parameters of any request: `priority` (from 2 on: bulk), `timeout` (microseconds); of generators:
`num_steps`, `guidance`, `negative_scale`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from grpc.aio import ServicerContext
from tritonclient.grpc import service_pb2, service_pb2_grpc

from distill_core.artifacts import ImageSpec
from distill_core.diffusion.super_resolution import LOW_RESOLUTION
from distill_core.errors import ArtifactError, ConfigError, DistilleryError, NotFound
from distill_core.kinds.cards import served_by
from distill_service.status import StatusError, shortened
from distillery_sampler.engine.checks import check_reply
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.image_formats import rgb_to_uint8, to_uint8
from distillery_sampler.engine.requests import (
    Call,
    GenerateRequest,
    ModelInfo,
    Picture,
    PredictRequest,
    Rendered,
    RenderRequest,
    View,
)
from distillery_sampler.engine.statistics import RequestStats, packing
from distillery_sampler.kserve.functions import (
    from_protocol,
    listed_functions,
    served_name,
    split_name,
    to_protocol,
)
from distillery_sampler.kserve.models import config, inputs_of, metadata, outputs_of, statistics
from distillery_sampler.kserve.parameters import (
    guidance_of,
    pictures_of,
    read_parameters,
    whole,
    with_terms,
)
from distillery_sampler.kserve.tensors import TensorSpec, read_inputs, write_outputs
from distillery_sampler.models.loading import LoadedModel
from distillery_sampler.v1.servicer import QUICK_VALUES, call_of

Answered = tuple[str, dict[str, np.ndarray], tuple[int, ...]]  # version, outputs, images with a cut prompt
Run = Callable[[str, dict[str, np.ndarray], dict[str, float], Call], Awaitable[Answered]]
SERVICE = "inference.GRPCInferenceService"
ADMIN_METHODS = frozenset(f"/{SERVICE}/{name}" for name in ("RepositoryModelLoad", "RepositoryModelUnload"))
FOR_PICTURES = frozenset({f"/{SERVICE}/ModelInfer"})
EXTENSIONS = ("model_repository", "model_configuration", "statistics", "schedule_policy")
API_VERSION = "1"
_SHARED_MEMORY = [
    f"{kind}SharedMemory{verb}"
    for kind in ("System", "Cuda")
    for verb in ("Status", "Register", "Unregister")
]
_UNSERVED = {
    **dict.fromkeys(_SHARED_MEMORY, "send tensors in the messages themselves"),
    "TraceSetting": "set OTEL_EXPORTER_OTLP_ENDPOINT for the sampler to trace calls",
    "LogSettings": "set DISTILLERY_LOG_LEVEL and DISTILLERY_LOG_FORMAT for the sampler",
}


class KserveServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, engine: Engine, is_ready: Callable[[], bool]) -> None:
        self._engine, self._is_ready = engine, is_ready

    async def ServerLive(self, request: Any, context: Any) -> service_pb2.ServerLiveResponse:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> service_pb2.ServerReadyResponse:
        return service_pb2.ServerReadyResponse(ready=self._is_ready())

    async def ServerMetadata(self, request: Any, context: Any) -> service_pb2.ServerMetadataResponse:
        return service_pb2.ServerMetadataResponse(
            name="distillery", version=API_VERSION, extensions=EXTENSIONS
        )

    async def ModelReady(
        self, request: service_pb2.ModelReadyRequest, context: Any
    ) -> service_pb2.ModelReadyResponse:
        """Whether a request is answered, as the index says; an unknown version is not ready, as in Triton."""
        name, function = split_name(request.name)
        try:
            info = await self._engine.models.get(_ref(name, request.version))
        except NotFound:
            return service_pb2.ModelReadyResponse(ready=False)
        there = not function or function in info.manifest.signature.functions
        return service_pb2.ModelReadyResponse(ready=info.is_servable and there)

    async def ModelMetadata(
        self, request: service_pb2.ModelMetadataRequest, context: Any
    ) -> service_pb2.ModelMetadataResponse:
        info, function = await self._described(request.name, request.version)
        return metadata(info, function)

    async def ModelConfig(
        self, request: service_pb2.ModelConfigRequest, context: Any
    ) -> service_pb2.ModelConfigResponse:
        info, function = await self._described(request.name, request.version)
        return service_pb2.ModelConfigResponse(config=config(info, self._engine.settings, function))

    async def ModelStatistics(
        self, request: service_pb2.ModelStatisticsRequest, context: Any
    ) -> service_pb2.ModelStatisticsResponse:
        """Of what is loaded; zeros for another version that is asked for, or that is ready."""
        asked, function = split_name(request.name)
        ready = {}
        for model in self._engine.models.loaded():
            name, version = model.manifest.name, model.manifest.version
            if asked in ("", name) and request.version in ("", str(version)):
                for part in _parts(model, function, every=not asked):
                    listed = served_name(name, part)
                    ready[listed, version] = statistics(listed, version, model.stats.of(part))
        if not asked:
            others = [(info, "") for info in await self._engine.models.infos() if info.is_servable]
        else:
            others = [] if ready else [await self._described(request.name, request.version)]
        for info, part in others:
            version = info.manifest.version
            for listed in listed_functions(info.manifest) if not asked else [part]:
                name = served_name(info.manifest.name, listed)
                ready.setdefault((name, version), statistics(name, version, RequestStats()))
        return service_pb2.ModelStatisticsResponse(model_stats=ready.values())

    async def _described(self, name: str, version: str) -> tuple[ModelInfo, str]:
        """A version of which it can be said what it takes and answers, and a function of it.

        Others are refused as a request is.
        """
        model, function = split_name(name)
        info = await self._engine.models.get(_ref(model, version))
        if info.state == "failed":
            raise ArtifactError(info.message, field="model")
        if function:
            info.manifest.signature.function(function)
        return info, function

    async def RepositoryIndex(
        self, request: service_pb2.RepositoryIndexRequest, context: Any
    ) -> service_pb2.RepositoryIndexResponse:
        reply = service_pb2.RepositoryIndexResponse()
        for info in await self._engine.models.infos():
            if info.is_servable or not request.ready:
                not_ready = "LOADING" if info.state == "loading" else "UNAVAILABLE"
                for function in listed_functions(info.manifest):
                    reply.models.add(
                        name=served_name(info.manifest.name, function),
                        version=str(info.manifest.version),
                        state="READY" if info.is_servable else not_ready,
                        reason=info.message,
                    )
        return reply

    async def RepositoryModelLoad(
        self, request: service_pb2.RepositoryModelLoadRequest, context: Any
    ) -> service_pb2.RepositoryModelLoadResponse:
        if request.parameters:
            raise ConfigError(
                "a model is loaded as it was published; leave config and files out", field="parameters"
            )
        await self._engine.models.load(_ref(request.model_name, ""))
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: service_pb2.RepositoryModelUnloadRequest, context: Any
    ) -> service_pb2.RepositoryModelUnloadResponse:
        await self._engine.models.unload(_ref(request.model_name, ""))
        return service_pb2.RepositoryModelUnloadResponse()

    async def ModelInfer(
        self, request: service_pb2.ModelInferRequest, context: ServicerContext
    ) -> service_pb2.ModelInferResponse:
        return await self._infer(request, call_of(context))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[service_pb2.ModelInferRequest], context: ServicerContext
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """One answer a request, in order; a wrong one is answered with its error, the stream goes on."""
        async for request in requests:
            try:
                reply = await self._infer(request, call_of(context))
                yield service_pb2.ModelStreamInferResponse(infer_response=reply)
            except DistilleryError as error:
                empty = service_pb2.ModelInferResponse(id=request.id, model_name=request.model_name)
                yield service_pb2.ModelStreamInferResponse(
                    error_message=shortened(str(error)), infer_response=empty
                )

    async def _infer(
        self, request: service_pb2.ModelInferRequest, call: Call
    ) -> service_pb2.ModelInferResponse:
        asked, function = split_name(request.model_name)
        ref = _ref(asked, request.model_version)
        manifest = await self._engine.models.manifest(ref)
        parameters = read_parameters(request, manifest)
        inputs = read_inputs(request, inputs_of(manifest, function))
        outputs = outputs_of(manifest, function)
        wanted = _wanted(request, outputs)
        runs: dict[str, Run] = {
            "render": self._views,
            "generate": self._images,
            "call": partial(self._called, function),
        }
        version, arrays, cut = await runs[served_by(manifest)](
            ref, inputs, parameters, with_terms(call, parameters)
        )
        name, _, number = version.partition("@")
        reply = service_pb2.ModelInferResponse(
            model_name=served_name(name, function), model_version=number, id=request.id
        )
        with packing():
            if cut:
                reply.parameters["cut_prompts"].string_param = ",".join(map(str, cut))
            write_outputs(reply, {k: (outputs[k].datatype, arrays[k]) for k in outputs if k in wanted})
        return reply

    async def _called(
        self,
        function: str,
        ref: str,
        inputs: dict[str, np.ndarray],
        parameters: dict[str, float],
        call: Call,
    ) -> Answered:
        spec = (await self._engine.models.manifest(ref)).signature.function(function)
        asked = PredictRequest(ref, function, from_protocol(spec.inputs, inputs), call)
        outputs, summary = await self._engine.predict(asked)
        return summary.model, to_protocol(spec.outputs, outputs), ()

    async def _images(
        self, ref: str, inputs: dict[str, np.ndarray], parameters: dict[str, float], call: Call
    ) -> Answered:
        nothing = np.empty(0, dtype=object)
        guidance = guidance_of(inputs, parameters, pictures_of(inputs))
        if guidance == 1 and "guidance_scale" in inputs:
            inputs.pop("negative_prompt", None)  # it has no weight then: who fills in every input may
        wanted = GenerateRequest(
            model=ref,
            seeds=tuple(int(seed) for seed in inputs.get("seed", nothing).ravel()),
            latents=inputs.get("latents"),
            low_resolution=_small_pictures(inputs),
            class_labels=tuple(int(label) for label in inputs.get("class_label", nothing).ravel()),
            prompts=tuple(inputs.get("prompt", nothing).ravel()),
            negative_prompts=tuple(inputs.get("negative_prompt", nothing).ravel()),
            negative_scale=parameters.get("negative_scale"),
            num_steps=whole(parameters, "num_steps"),
            guidance=guidance,
            call=call,
        )
        pictures, summary = await self._engine.generate(wanted, self._approve)
        with packing():
            values = sum(picture.pixels.size for picture in pictures)
            quick = values <= QUICK_VALUES
            stacked = _stacked(pictures) if quick else await asyncio.to_thread(_stacked, pictures)
            return summary.model, stacked, summary.cut_prompts

    def _approve(self, image: ImageSpec, count: int) -> None:
        check_reply(
            count,
            math.prod(image.picture),
            self._engine.settings,
            field="inputs.seed",
            stream="smaller batches",
        )

    async def _views(
        self, ref: str, inputs: dict[str, np.ndarray], parameters: dict[str, float], call: Call
    ) -> Answered:
        poses, pinholes = inputs["pose"], inputs["intrinsics"]
        if len(poses) != len(pinholes):
            raise ConfigError(
                f"{len(poses)} poses and {len(pinholes)} intrinsics; these must be equal", field="inputs"
            )
        if len(poses) > self._engine.settings.max_views:
            raise ConfigError(
                f"{len(poses)} views in one request are too many; allowed are {self._engine.settings.max_views}, "
                "send several",
                field="inputs.pose",
            )
        if not np.isfinite(pinholes).all():
            raise ConfigError("intrinsics hold NaN or infinity", field="inputs.intrinsics")
        width, height = (
            round(2 * float(pinholes[0, axis])) if given is None else given
            for axis, given in ((2, whole(parameters, "width")), (3, whole(parameters, "height")))
        )
        check_reply(
            len(poses),
            7 * width * height,
            self._engine.settings,
            field="inputs.pose",
            stream="smaller batches",
        )
        views = tuple(
            View(width, height, pose=pose, intrinsics=tuple(float(v) for v in pinhole))  # type: ignore[arg-type]
            for pose, pinhole in zip(poses, pinholes, strict=True)
        )
        rendered, version = [], ref
        async with aclosing(self._engine.render(RenderRequest(ref, views, call=call))) as events:
            async for event in events:
                if isinstance(event, Rendered):
                    rendered.append(event)
                else:
                    version = event.model
        with packing():
            quick = sum(view.rgb.size for view in rendered) <= QUICK_VALUES
            return version, _seen(rendered) if quick else await asyncio.to_thread(_seen, rendered), ()


def _refuse(name: str, instead: str) -> Callable[..., Any]:
    async def method(self: KserveServicer, request: Any, context: Any) -> Any:
        raise StatusError("UNIMPLEMENTED", f"{name} is not served here: {instead}")

    method.__name__ = name
    return method


for _name, _instead in _UNSERVED.items():  # the generated base class answers these with an internal error
    setattr(KserveServicer, _name, _refuse(_name, _instead))


def _ref(name: str, version: str) -> str:
    if not name:
        raise NotFound("the request names no model", field="model_name")
    return f"{name}@{version}" if version else name


def _parts(model: LoadedModel, function: str, *, every: bool) -> list[str]:
    """Functions of a loaded model whose statistics are asked for."""
    if function:
        model.manifest.signature.function(function)
    return listed_functions(model.manifest) if every else [function]


def _stacked(pictures: list[Picture]) -> dict[str, np.ndarray]:
    return {"images": np.stack([to_uint8(picture.pixels) for picture in pictures])}


def _small_pictures(inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Pictures to enlarge (B, C, h, w) in [-1, 1], of bytes (B, h, w, C)."""
    given = inputs.get(LOW_RESOLUTION)
    return None if given is None else given.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def _seen(views: list[Rendered]) -> dict[str, np.ndarray]:
    rgb, depth = [rgb_to_uint8(view.rgb) for view in views], [view.depth for view in views]
    return {"rgb": np.stack(rgb), "depth": np.stack(depth)}


def _wanted(request: service_pb2.ModelInferRequest, outputs: Mapping[str, TensorSpec]) -> set[str]:
    """The outputs asked for; none is all."""
    for output in request.outputs:
        if output.name not in outputs:
            raise ConfigError(
                f"output {output.name!r} is not known; known: {', '.join(outputs)}", field="outputs"
            )
        if output.parameters:
            raise ConfigError(
                f"output {output.name!r} has the parameters {', '.join(sorted(output.parameters))}; there is no "
                "shared memory and no classification here, leave them out",
                field="outputs",
            )
    return {output.name for output in request.outputs} or set(outputs)

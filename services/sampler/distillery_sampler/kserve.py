"""KServe v2, `inference.GRPCInferenceService`, with the messages that tritonclient ships.

A generator takes `class_label` INT64 [B,1] or `prompt` BYTES [B,1] if it is conditional, and all else if the caller
likes: `seed` UINT64 [B,1], without which a picture is that of seed 0 and its place, `latents` FP32 [B,C,H,W], which are
its first noise, `negative_prompt` BYTES [B,1], `guidance_scale` FP32 [B,1], equal for all. It answers `images` UINT8
[B,H,W,C]. A scene takes `pose` FP32 [B,4,4] and `intrinsics` FP32 [B,4] and answers `rgb` and `depth`; a picture is
twice its principal point in size, unless the parameters `width` and `height` say otherwise. Parameters of any request:
`priority` (from 2 on: bulk), `timeout` (microseconds); of generators: `num_steps`, `guidance`, `negative_scale`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from grpc.aio import ServicerContext
from tritonclient.grpc import service_pb2, service_pb2_grpc

from distill_core.artifacts import ImageSpec, Manifest
from distill_core.errors import ArtifactError, ConfigError, DistilleryError, NotFound, nearest
from distill_core.kinds.cards import served_by
from distill_service.status import StatusError, shortened
from distillery_sampler.checks import check_reply
from distillery_sampler.engine import Engine
from distillery_sampler.images import rgb_to_uint8, to_uint8
from distillery_sampler.kserve_models import PRIORITIES, config, inputs_of, metadata, outputs_of, statistics
from distillery_sampler.requests import (
    Call,
    GenerateRequest,
    ModelInfo,
    Picture,
    Rendered,
    RenderRequest,
    View,
)
from distillery_sampler.servicer import QUICK_VALUES, call_of
from distillery_sampler.statistics import RequestStats, packing
from distillery_sampler.tensors import TensorSpec, read_inputs, write_outputs

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
_OF_ALL = ("priority", "timeout")
_OF_GENERATORS = ("num_steps", "guidance", "negative_scale")
_OF_SCENES = ("width", "height")


class KserveServicer(service_pb2_grpc.GRPCInferenceServiceServicer):
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
        try:
            info = await self._engine.models.get(_ref(request.name, request.version))
        except NotFound:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=info.answers)

    async def ModelMetadata(
        self, request: service_pb2.ModelMetadataRequest, context: Any
    ) -> service_pb2.ModelMetadataResponse:
        return metadata(await self._described(request.name, request.version))

    async def ModelConfig(
        self, request: service_pb2.ModelConfigRequest, context: Any
    ) -> service_pb2.ModelConfigResponse:
        info = await self._described(request.name, request.version)
        return service_pb2.ModelConfigResponse(config=config(info, self._engine.settings))

    async def ModelStatistics(
        self, request: service_pb2.ModelStatisticsRequest, context: Any
    ) -> service_pb2.ModelStatisticsResponse:
        """Of what is loaded; zeros for another version that is asked for, or that is ready."""
        found = {}
        for model in self._engine.models.loaded():
            name, version = model.manifest.name, model.manifest.version
            if request.name in ("", name) and request.version in ("", str(version)):
                found[name, version] = statistics(name, version, model.stats.requests)
        if not request.name:
            others = [info for info in await self._engine.models.infos() if info.answers]
        else:
            others = [] if found else [await self._described(request.name, request.version)]
        for info in others:
            name, version = info.manifest.name, info.manifest.version
            found.setdefault((name, version), statistics(name, version, RequestStats()))
        return service_pb2.ModelStatisticsResponse(model_stats=found.values())

    async def _described(self, name: str, version: str) -> ModelInfo:
        """A version of which it can be said what it takes and answers; others are refused as a request is."""
        info = await self._engine.models.get(_ref(name, version))
        if info.state == "failed":
            raise ArtifactError(info.message, field="model")
        return info

    async def RepositoryIndex(
        self, request: service_pb2.RepositoryIndexRequest, context: Any
    ) -> service_pb2.RepositoryIndexResponse:
        reply = service_pb2.RepositoryIndexResponse()
        for info in await self._engine.models.infos():
            if info.answers or not request.ready:
                not_ready = "LOADING" if info.state == "loading" else "UNAVAILABLE"
                reply.models.add(
                    name=info.manifest.name,
                    version=str(info.manifest.version),
                    state="READY" if info.answers else not_ready,
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
        ref = _ref(request.model_name, request.model_version)
        manifest = await self._engine.models.manifest(ref)
        parameters = _parameters(request, manifest)
        inputs = read_inputs(request, inputs_of(manifest))
        outputs = outputs_of(manifest)
        wanted = _wanted(request, outputs)
        run = self._views if served_by(manifest) == "render" else self._images
        version, arrays, cut = await run(ref, inputs, parameters, _with_terms(call, parameters))
        name, _, number = version.partition("@")
        reply = service_pb2.ModelInferResponse(model_name=name, model_version=number, id=request.id)
        with packing():
            if cut:
                reply.parameters["cut_prompts"].string_param = ",".join(map(str, cut))
            write_outputs(reply, {k: (outputs[k].datatype, arrays[k]) for k in outputs if k in wanted})
        return reply

    async def _images(
        self, ref: str, inputs: dict[str, np.ndarray], parameters: dict[str, float], call: Call
    ) -> tuple[str, dict[str, np.ndarray], tuple[int, ...]]:
        nothing = np.empty(0, dtype=object)
        guidance = _guidance(inputs, parameters, _pictures(inputs))
        if guidance == 1 and "guidance_scale" in inputs:
            inputs.pop("negative_prompt", None)  # it has no weight then: who fills in every input may
        wanted = GenerateRequest(
            model=ref,
            seeds=tuple(int(seed) for seed in inputs.get("seed", nothing).ravel()),
            latents=inputs.get("latents"),
            class_labels=tuple(int(label) for label in inputs.get("class_label", nothing).ravel()),
            prompts=tuple(inputs.get("prompt", nothing).ravel()),
            negative_prompts=tuple(inputs.get("negative_prompt", nothing).ravel()),
            negative_scale=parameters.get("negative_scale"),
            num_steps=_whole(parameters, "num_steps"),
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
    ) -> tuple[str, dict[str, np.ndarray], tuple[int, ...]]:
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
            for axis, given in ((2, _whole(parameters, "width")), (3, _whole(parameters, "height")))
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


def _stacked(pictures: list[Picture]) -> dict[str, np.ndarray]:
    return {"images": np.stack([to_uint8(picture.pixels) for picture in pictures])}


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


def _parameters(request: service_pb2.ModelInferRequest, manifest: Manifest) -> dict[str, float]:
    """The request's parameters, all of them numbers; what Triton's own clients add for Triton is passed over."""
    known = (*_OF_ALL, *(_OF_SCENES if served_by(manifest) == "render" else _OF_GENERATORS))
    found = {}
    for name, given in request.parameters.items():
        if name.startswith("triton_"):
            continue
        if name not in known:
            raise ConfigError(
                f"parameter {name!r} is not known{nearest(name, known)}", field=f"parameters.{name}"
            )
        value = getattr(given, given.WhichOneof("parameter_choice") or "int64_param")
        whole = name not in ("guidance", "negative_scale")
        if isinstance(value, bool | str) or (whole and not float(value).is_integer()):
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"parameter {name} = {value!r} is not {kind}", field=f"parameters.{name}")
        found[name] = value
    return found


def _whole(parameters: Mapping[str, float], name: str) -> int | None:
    return int(parameters[name]) if name in parameters else None


def _pictures(inputs: Mapping[str, np.ndarray]) -> int:
    """How many pictures are asked for: the batch of the inputs that are given; without any it is one."""
    return next((len(value) for name, value in inputs.items() if name != "guidance_scale"), 1)


def _guidance(
    inputs: Mapping[str, np.ndarray], parameters: Mapping[str, float], pictures: int
) -> float | None:
    """From the parameter `guidance` or the input `guidance_scale`."""
    scales = inputs.get("guidance_scale")
    if scales is None:
        return parameters.get("guidance")
    if "guidance" in parameters:
        raise ConfigError(
            "guidance is given as input guidance_scale and as parameter; give one",
            field="parameters.guidance",
        )
    if len(scales) != pictures or (scales != scales[0]).any():
        raise ConfigError(
            "guidance_scale must hold one value for each picture, and these must be equal; send several requests",
            field="inputs.guidance_scale",
        )
    return float(scales[0, 0])


def _with_terms(call: Call, parameters: Mapping[str, float]) -> Call:
    """Triton's `priority` and `timeout`."""
    for name in _OF_ALL:
        if parameters.get(name, 0) < 0:
            raise ConfigError(
                f"parameter {name} = {parameters[name]} is not allowed: give 0 or more",
                field=f"parameters.{name}",
            )
    timeout = parameters.get("timeout", 0)
    if timeout:
        until = asyncio.get_running_loop().time() + timeout / 1e6
        call = replace(call, deadline=until if call.deadline is None else min(until, call.deadline))
    return replace(call, bulk=parameters.get("priority", 0) >= PRIORITIES)

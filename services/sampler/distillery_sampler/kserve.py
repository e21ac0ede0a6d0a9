"""KServe v2, `inference.GRPCInferenceService`, with the messages that tritonclient ships.

A generator takes `seed` UINT64 [B,1], and `class_label` INT64 [B,1] or `prompt` BYTES [B,1] if it is
conditional, and answers `images` UINT8 [B,H,W,C]. A scene takes `pose` FP32 [B,4,4] and `intrinsics` FP32
[B,4] and answers `rgb` and `depth`; a picture is twice its principal point in size, unless the parameters
`width` and `height` say otherwise.
Parameters of any request: `num_steps`, `guidance`, `priority` (from 2 on: bulk), `timeout` (microseconds).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from grpc.aio import ServicerContext
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from distill_core.artifacts import ImageSpec, Manifest
from distill_core.errors import ConfigError, DistilleryError, NotFound
from distill_service.status import StatusError
from distillery_sampler.checks import check_reply
from distillery_sampler.engine import Engine
from distillery_sampler.images import rgb_to_uint8, to_uint8
from distillery_sampler.loading import LoadedModel
from distillery_sampler.requests import (
    Call,
    GenerateRequest,
    ModelInfo,
    Rendered,
    RenderRequest,
    View,
)
from distillery_sampler.servicer import call_of
from distillery_sampler.tensors import TensorSpec, read_inputs, write_outputs

SERVICE = "inference.GRPCInferenceService"
ADMIN_METHODS = frozenset(f"/{SERVICE}/{name}" for name in ("RepositoryModelLoad", "RepositoryModelUnload"))
EXTENSIONS = ("model_repository", "model_configuration", "statistics", "schedule_policy")
API_VERSION = "1"
BULK_FROM = 2
_STATES = {"ready": "READY", "loading": "LOADING"}
_UNSERVED = (
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)


def inputs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The inputs of a model, by name."""
    if manifest.kind == "field":
        specs = [TensorSpec("pose", "FP32", (-1, 4, 4)), TensorSpec("intrinsics", "FP32", (-1, 4))]
        return {spec.name: spec for spec in specs}
    specs = [TensorSpec("seed", "UINT64", (-1, 1))]
    if manifest.cond and manifest.cond.kind == "class_label":
        specs.append(TensorSpec("class_label", "INT64", (-1, 1)))
    if manifest.cond and manifest.cond.kind == "prompt":
        specs.append(TensorSpec("prompt", "BYTES", (-1, 1)))
    return {spec.name: spec for spec in specs}


def outputs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The outputs of a model, by name."""
    if manifest.kind == "field":
        specs = [TensorSpec("rgb", "UINT8", (-1, -1, -1, 3)), TensorSpec("depth", "FP32", (-1, -1, -1))]
        return {spec.name: spec for spec in specs}
    channels, height, width = manifest.image.picture if manifest.image else (-1, -1, -1)
    return {"images": TensorSpec("images", "UINT8", (-1, height, width, channels))}


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
        """A version in the store is ready too: its first request loads it."""
        info = await self._engine.models.get(_ref(request.name, request.version))
        return service_pb2.ModelReadyResponse(ready=info.state in ("ready", "available"))

    async def ModelMetadata(
        self, request: service_pb2.ModelMetadataRequest, context: Any
    ) -> service_pb2.ModelMetadataResponse:
        info = await self._engine.models.get(_ref(request.name, request.version))
        metadata = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            name=info.manifest.name,
            versions=[str(info.manifest.version)],
            platform=_platform(info),
            inputs=[
                metadata(name=s.name, datatype=s.datatype, shape=s.shape) for s in _sorted(inputs_of, info)
            ],
            outputs=[
                metadata(name=s.name, datatype=s.datatype, shape=s.shape) for s in _sorted(outputs_of, info)
            ],
        )

    async def ModelConfig(
        self, request: service_pb2.ModelConfigRequest, context: Any
    ) -> service_pb2.ModelConfigResponse:
        info = await self._engine.models.get(_ref(request.name, request.version))
        config = model_config_pb2.ModelConfig(
            name=info.manifest.name,
            platform=_platform(info),
            backend=info.backend,
            max_batch_size=self._engine.settings.max_images,  # of a request; it is split over device batches
        )
        config.dynamic_batching.preferred_batch_size.extend([info.max_batch] if info.max_batch else [])
        for spec in _sorted(inputs_of, info):
            config.input.add(
                name=spec.name, data_type=_type(spec), dims=spec.shape[1:], optional=spec.optional
            )
        for spec in _sorted(outputs_of, info):
            config.output.add(name=spec.name, data_type=_type(spec), dims=spec.shape[1:])
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelStatistics(
        self, request: service_pb2.ModelStatisticsRequest, context: Any
    ) -> service_pb2.ModelStatisticsResponse:
        found = [
            model
            for model in self._engine.models.loaded()
            if request.name in ("", model.manifest.name)
            and request.version in ("", str(model.manifest.version))
        ]
        if request.name and not found:
            await self._engine.models.get(_ref(request.name, request.version))  # unknown: NOT_FOUND
        return service_pb2.ModelStatisticsResponse(model_stats=[_statistics(model) for model in found])

    async def RepositoryIndex(
        self, request: service_pb2.RepositoryIndexRequest, context: Any
    ) -> service_pb2.RepositoryIndexResponse:
        reply = service_pb2.RepositoryIndexResponse()
        for info in await self._engine.models.infos():
            if info.state == "ready" or not request.ready:
                reply.models.add(
                    name=info.manifest.name,
                    version=str(info.manifest.version),
                    state=_STATES.get(info.state, "UNAVAILABLE"),
                    reason=info.message,
                )
        return reply

    async def RepositoryModelLoad(
        self, request: service_pb2.RepositoryModelLoadRequest, context: Any
    ) -> service_pb2.RepositoryModelLoadResponse:
        await self._engine.models.load(request.model_name)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: service_pb2.RepositoryModelUnloadRequest, context: Any
    ) -> service_pb2.RepositoryModelUnloadResponse:
        await self._engine.models.unload(request.model_name)
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
                yield service_pb2.ModelStreamInferResponse(error_message=str(error), infer_response=empty)

    async def _infer(
        self, request: service_pb2.ModelInferRequest, call: Call
    ) -> service_pb2.ModelInferResponse:
        ref = _ref(request.model_name, request.model_version)
        manifest = (await self._engine.models.get(ref)).manifest
        call = _with_parameters(call, request)
        inputs = read_inputs(request, inputs_of(manifest))
        outputs = outputs_of(manifest)
        for output in request.outputs:
            if output.name not in outputs:
                raise ConfigError(
                    f"output {output.name!r} is not known; known: {', '.join(outputs)}", field="outputs"
                )
        run = self._views if manifest.kind == "field" else self._images
        version, arrays = await run(ref, request, inputs, call)
        wanted = {output.name for output in request.outputs} or set(outputs)
        name, _, number = version.partition("@")
        reply = service_pb2.ModelInferResponse(model_name=name, model_version=number, id=request.id)
        write_outputs(reply, {k: (outputs[k].datatype, v) for k, v in arrays.items() if k in wanted})
        return reply

    async def _images(
        self, ref: str, request: service_pb2.ModelInferRequest, inputs: dict[str, np.ndarray], call: Call
    ) -> tuple[str, dict[str, np.ndarray]]:
        wanted = GenerateRequest(
            model=ref,
            seeds=tuple(int(seed) for seed in inputs["seed"].ravel()),
            class_labels=tuple(int(label) for label in inputs.get("class_label", np.empty(0)).ravel()),
            prompts=tuple(inputs.get("prompt", np.empty(0, dtype=object)).ravel()),
            num_steps=_number(request, "num_steps", int),
            guidance=_number(request, "guidance", float),
            call=call,
        )
        pictures, summary = await self._engine.generate(wanted, self._approve)
        return summary.model, {"images": np.stack([to_uint8(picture.pixels) for picture in pictures])}

    def _approve(self, image: ImageSpec, count: int) -> None:
        check_reply(
            count,
            math.prod(image.picture),
            self._engine.settings,
            field="inputs.seed",
            stream="smaller batches",
        )

    async def _views(
        self, ref: str, request: service_pb2.ModelInferRequest, inputs: dict[str, np.ndarray], call: Call
    ) -> tuple[str, dict[str, np.ndarray]]:
        poses, pinholes = inputs["pose"], inputs["intrinsics"]
        if len(poses) != len(pinholes):
            raise ConfigError(
                f"{len(poses)} poses and {len(pinholes)} intrinsics; these must be equal", field="inputs"
            )
        if not np.isfinite(pinholes).all():
            raise ConfigError("intrinsics hold NaN or infinity", field="inputs.intrinsics")
        width = _number(request, "width", int) or round(2 * float(pinholes[0, 2]))
        height = _number(request, "height", int) or round(2 * float(pinholes[0, 3]))
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
        return version, {
            "rgb": np.stack([rgb_to_uint8(view.rgb) for view in rendered]),
            "depth": np.stack([view.depth for view in rendered]),
        }


def _refuse(name: str) -> Callable[..., Any]:
    async def method(self: KserveServicer, request: Any, context: Any) -> Any:
        raise StatusError(
            "UNIMPLEMENTED", f"{name} is not served here: send tensors in the messages themselves"
        )

    method.__name__ = name
    return method


for _name in _UNSERVED:  # the generated base class answers these with an internal error
    setattr(KserveServicer, _name, _refuse(_name))


def _ref(name: str, version: str) -> str:
    if not name:
        raise NotFound("the request names no model", field="model_name")
    return f"{name}@{version}" if version else name


def _sorted(specs: Callable[[Manifest], dict[str, TensorSpec]], info: ModelInfo) -> list[TensorSpec]:
    return list(specs(info.manifest).values())


def _platform(info: ModelInfo) -> str:
    return f"distillery_{info.manifest.kind}"


def _type(spec: TensorSpec) -> int:
    name = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return model_config_pb2.DataType.Value(f"TYPE_{name}")


def _parameter(request: service_pb2.ModelInferRequest, name: str) -> Any:
    value = request.parameters.get(name)
    return None if value is None else getattr(value, value.WhichOneof("parameter_choice") or "int64_param")


def _number(request: service_pb2.ModelInferRequest, name: str, kind: type) -> Any:
    value = _parameter(request, name)
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"parameter {name} = {value!r} is not a number", field=f"parameters.{name}"
        ) from None


def _with_parameters(call: Call, request: service_pb2.ModelInferRequest) -> Call:
    """Triton's `priority` and `timeout`."""
    timeout = _number(request, "timeout", int)
    if timeout:
        until = asyncio.get_running_loop().time() + timeout / 1e6
        call = replace(call, deadline=until if call.deadline is None else min(until, call.deadline))
    return replace(call, bulk=(_number(request, "priority", int) or 0) >= BULK_FROM)


def _statistics(model: LoadedModel) -> service_pb2.ModelStatistics:
    stats, nanoseconds = model.stats, 1e9
    reply = service_pb2.ModelStatistics(
        name=model.manifest.name,
        version=str(model.manifest.version),
        inference_count=stats.images,
        execution_count=stats.batches,
    )
    total = stats.queue_s + stats.infer_s
    for field, count, seconds in (
        ("success", stats.images, total),
        ("fail", stats.failures, 0.0),
        ("queue", stats.images, stats.queue_s),
        ("compute_infer", stats.batches, stats.infer_s),
    ):
        part = getattr(reply.inference_stats, field)
        part.count, part.ns = count, int(seconds * nanoseconds)
    return reply

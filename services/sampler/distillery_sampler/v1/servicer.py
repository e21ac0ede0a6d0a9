"""`distillery.v1.SamplerService` and `ModelsService`: message, call, message."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import cache, partial

import numpy as np
from grpc.aio import ServicerContext

from distill_core.artifacts import ImageSpec
from distill_core.errors import ConfigError
from distill_service.auth import CALLER
from distillery.v1 import (
    common_pb2,
    models_pb2,
    models_pb2_grpc,
    sampler_pb2,
    sampler_pb2_grpc,
)
from distillery_sampler.engine import image_formats
from distillery_sampler.engine.checks import check_reply
from distillery_sampler.engine.engine import Approve, Engine
from distillery_sampler.engine.requests import Call, Picture, Rendered
from distillery_sampler.engine.statistics import packing
from distillery_sampler.models.tuning import cores
from distillery_sampler.v1.messages import (
    format_from,
    generate_from,
    generate_summary,
    is_bulk,
    model_to,
    outputs_from,
    path_from,
    predict_from,
    predicted,
    render_from,
    render_summary,
)
from distillery_sampler.v1.wire import tensor_to

QUICK_VALUES = 2**17  # of a picture that is packed where it is, in less than a millisecond
FOR_PICTURES = frozenset(
    f"/distillery.v1.SamplerService/{name}"
    for name in ("Generate", "GenerateStream", "Render", "RenderPath", "Predict")
)
ADMIN_METHODS = frozenset(f"/distillery.v1.ModelsService/{name}" for name in ("LoadModel", "UnloadModel"))


def call_of(context: ServicerContext, *, bulk: bool = False) -> Call:
    """Caller, and their deadline on the event loop's clock."""
    remaining = context.time_remaining()
    deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
    return Call(CALLER.get().name, deadline, bulk)


class Encoders:
    """Threads that pack pictures, so that neither the event loop nor a model waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._seconds = cache(engine.metrics.encode_seconds.labels)  # by format
        self._threads = ThreadPoolExecutor(cores(), thread_name_prefix="encode")

    async def pictures(
        self, made: list[Picture], image_format: image_formats.Format
    ) -> list[common_pb2.Image]:
        """Pictures of one size as messages, in order."""
        if not _is_quick(made[0].pixels, image_format):
            loop, packed = asyncio.get_running_loop(), partial(self._picture, image_format)
            return await asyncio.gather(
                *(loop.run_in_executor(self._threads, packed, picture) for picture in made)
            )
        return [self._picture(image_format, picture) for picture in made]

    async def view(self, rendered: Rendered, image_format: image_formats.Format) -> common_pb2.Image:
        """A view's colours as a message."""
        packed = partial(self._packed, rendered.rgb, image_formats.rgb_to_uint8, image_format, rendered.index)
        if _is_quick(rendered.rgb, image_format):
            return packed()
        return await asyncio.get_running_loop().run_in_executor(self._threads, packed)

    def _picture(self, image_format: image_formats.Format, picture: Picture) -> common_pb2.Image:
        return self._packed(picture.pixels, image_formats.to_uint8, image_format, picture.index, picture.seed)

    def _packed(
        self,
        values: np.ndarray,
        to_uint8: Callable[[np.ndarray], np.ndarray],
        image_format: image_formats.Format,
        index: int,
        seed: int = 0,
    ) -> common_pb2.Image:
        started = time.perf_counter()
        pixels = to_uint8(values)
        data = image_formats.encode(pixels, image_format)
        self._seconds(image_format).observe(time.perf_counter() - started)
        height, width, channels = pixels.shape
        return common_pb2.Image(
            index=index,
            data=data,
            format=f"IMAGE_FORMAT_{image_format}",
            width=width,
            height=height,
            channels=channels,
            seed=seed,
        )


def _is_quick(pixels: np.ndarray, image_format: image_formats.Format) -> bool:
    """Whether packing keeps the event loop for no longer than a thread would keep the next tile waiting."""
    return image_format == "RAW_U8" and pixels.size <= QUICK_VALUES


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._encoders = Encoders(engine)

    async def Generate(
        self, request: sampler_pb2.GenerateRequest, context: ServicerContext
    ) -> sampler_pb2.GenerateResponse:
        image_format = format_from(request.image_format)
        generation = generate_from(request, call_of(context, bulk=is_bulk(request.priority)))
        approve = self._approve(image_format, 5 if request.with_tensor else 1)  # uint8, and float32
        pictures, summary = await self._engine.generate(generation, approve)
        with packing():
            packed = await self._encoders.pictures(pictures, image_format)
            tensor = np.stack([picture.pixels for picture in pictures]) if request.with_tensor else None
            return sampler_pb2.GenerateResponse(
                images=packed,
                tensor=None if tensor is None else tensor_to(tensor),
                summary=generate_summary(summary),
            )

    async def GenerateStream(
        self, request: sampler_pb2.GenerateStreamRequest, context: ServicerContext
    ) -> AsyncIterator[sampler_pb2.GenerateStreamResponse]:
        inner = request.request
        if inner.with_tensor:
            raise ConfigError(
                "with_tensor is for Generate; a stream sends images", field="request.with_tensor"
            )
        image_format = format_from(inner.image_format)
        generation = generate_from(inner, call_of(context, bulk=is_bulk(inner.priority)))
        approve = self._approve(image_format, 0)  # one image a message always fits
        async with aclosing(self._engine.generate_stream(generation, approve)) as events:
            async for event in events:
                if isinstance(event, Picture):
                    with packing():
                        (image,) = await self._encoders.pictures([event], image_format)
                    yield sampler_pb2.GenerateStreamResponse(image=image)
                else:
                    yield sampler_pb2.GenerateStreamResponse(summary=generate_summary(event))

    async def Render(
        self, request: sampler_pb2.RenderRequest, context: ServicerContext
    ) -> sampler_pb2.RenderResponse:
        rendering = render_from(request, call_of(context, bulk=is_bulk(request.options.priority)))
        outputs = outputs_from(request.options)
        image_format = format_from(request.options.image_format)
        self._check_view_size(request.options, outputs)
        reply = sampler_pb2.RenderResponse()
        async with aclosing(self._engine.render(rendering)) as events:
            async for event in events:
                if isinstance(event, Rendered):
                    reply.view.CopyFrom(await self._view(event, outputs, image_format))
                else:
                    reply.summary.CopyFrom(render_summary(event))
        return reply

    async def RenderPath(
        self, request: sampler_pb2.RenderPathRequest, context: ServicerContext
    ) -> AsyncIterator[sampler_pb2.RenderPathResponse]:
        call = call_of(context, bulk=is_bulk(request.options.priority))
        rendering = path_from(request, call, self._engine.settings)
        outputs = outputs_from(request.options)
        image_format = format_from(request.options.image_format)
        self._check_view_size(request.options, outputs)
        async with aclosing(self._engine.render(rendering)) as events:
            async for event in events:
                if isinstance(event, Rendered):
                    view = await self._view(event, outputs, image_format)
                    yield sampler_pb2.RenderPathResponse(view=view)
                else:
                    yield sampler_pb2.RenderPathResponse(summary=render_summary(event))

    async def Predict(
        self, request: sampler_pb2.PredictRequest, context: ServicerContext
    ) -> sampler_pb2.PredictResponse:
        prediction = predict_from(request, call_of(context, bulk=is_bulk(request.priority)))
        outputs, summary = await self._engine.predict(prediction)
        with packing():
            return predicted(outputs, summary)

    def _approve(self, image_format: image_formats.Format, bytes_per_value: int) -> Approve:
        def approve(image: ImageSpec, count: int) -> None:
            image_formats.check_format(image.picture[0], image_format)
            check_reply(
                count,
                math.prod(image.picture) * bytes_per_value,
                self._engine.settings,
                field="count",
                stream="GenerateStream",
            )

        return approve

    def _check_view_size(self, options: sampler_pb2.ViewOptions, outputs: frozenset[int]) -> None:
        floats = sum(3 if output == sampler_pb2.RENDER_OUTPUT_NORMAL else 1 for output in outputs)
        bytes_each = options.width * options.height * 4 * floats
        check_reply(
            1, bytes_each, self._engine.settings, field="options.width", stream="several smaller views"
        )

    async def _view(
        self, rendered: Rendered, outputs: frozenset[int], image_format: image_formats.Format
    ) -> sampler_pb2.View:
        view = sampler_pb2.View(index=rendered.index)
        with packing():
            if sampler_pb2.RENDER_OUTPUT_RGB in outputs:
                view.rgb.CopyFrom(await self._encoders.view(rendered, image_format))
            if sampler_pb2.RENDER_OUTPUT_DEPTH in outputs:
                view.depth.CopyFrom(tensor_to(rendered.depth))
            if sampler_pb2.RENDER_OUTPUT_OPACITY in outputs:
                view.opacity.CopyFrom(tensor_to(rendered.opacity))
            if rendered.normal is not None:
                view.normal.CopyFrom(tensor_to(rendered.normal))
        if rendered.region is not None:
            region = rendered.region
            rows = region.rows
            view.region.CopyFrom(
                sampler_pb2.Region(top=rows.start, rows=len(rows), factor=region.factor, last=region.last)
            )
        return view


class ModelsServicer(models_pb2_grpc.ModelsServiceServicer):
    def __init__(self, engine: Engine) -> None:
        self._models = engine.models
        self._poll_s = engine.settings.poll_s

    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: ServicerContext
    ) -> models_pb2.ListModelsResponse:
        infos = await self._models.infos(all_versions=request.all_versions)
        return models_pb2.ListModelsResponse(models=[model_to(info) for info in infos])

    async def GetModel(
        self, request: models_pb2.GetModelRequest, context: ServicerContext
    ) -> models_pb2.GetModelResponse:
        return models_pb2.GetModelResponse(model=model_to(await self._models.get(request.model)))

    async def LoadModel(
        self, request: models_pb2.LoadModelRequest, context: ServicerContext
    ) -> models_pb2.LoadModelResponse:
        return models_pb2.LoadModelResponse(model=model_to(await self._models.load(request.model)))

    async def UnloadModel(
        self, request: models_pb2.UnloadModelRequest, context: ServicerContext
    ) -> models_pb2.UnloadModelResponse:
        await self._models.unload(request.model)
        return models_pb2.UnloadModelResponse()

    async def WatchModels(
        self, request: models_pb2.WatchModelsRequest, context: ServicerContext
    ) -> AsyncIterator[models_pb2.WatchModelsResponse]:
        known: dict[tuple[str, int], models_pb2.Model] = {}
        while True:
            infos = await self._models.infos()
            now = {(info.manifest.name, info.manifest.version): model_to(info) for info in infos}
            for key, gone in known.items():
                if key not in now:
                    gone.state = models_pb2.MODEL_STATE_UNLOADED
                    yield models_pb2.WatchModelsResponse(model=gone)
            for key, model in now.items():
                if known.get(key) != model:
                    yield models_pb2.WatchModelsResponse(model=model)
            known = now
            await self._models.wait_for_change(self._poll_s)

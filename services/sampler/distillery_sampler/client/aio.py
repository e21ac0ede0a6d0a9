"""The client for asyncio programs: `SamplerClient`'s calls as coroutines and asynchronous iterators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Self, Unpack

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distill_service.channels import MAX_RETRIES, channel
from distill_service.status import error_from_call, errors_from
from distillery.v1 import models_pb2, models_pb2_grpc, sampler_pb2, sampler_pb2_grpc
from distillery_sampler.client.limits import Limits
from distillery_sampler.client.messages import (
    GenerateOptions,
    OnSummary,
    SeenView,
    ViewOptions,
    improved,
    orbit,
    outputs_of,
    path_request,
    picture_from,
    predict_request,
    progressive_request,
    raw_request,
    render_request,
    seen,
    warn_of_cut_prompts,
)
from distillery_sampler.client.sync import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, SERVICE, WAIT_S, not_ready


class AsyncSamplerClient:
    """`SamplerClient` for asyncio, with the same arguments, options, answers and errors; make it in a coroutine.

    Cancelling a task cancels its call on the server. Leave a stream early through `contextlib.aclosing`, or cancel the
    task that reads it.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        ca: Path | str | None = None,
        cert: Path | str | None = None,
        key: Path | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = MAX_RETRIES,
    ) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._limits = Limits(address)
        self._channel = channel(address, token=token, ca=ca, cert=cert, key=key, retries=retries, aio=True)
        self._sampler = sampler_pb2_grpc.SamplerServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelsServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight end with CANCELLED."""
        await self._channel.close()

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """As `SamplerClient.wait_ready`."""
        clock = asyncio.get_running_loop().time
        until = clock() + timeout_s
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        while (left := until - clock()) > 0:
            call = self._health.Watch(request, timeout=left, wait_for_ready=True)
            try:
                async for reply in call:
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise error_from_call(error, self.address) from None
                await asyncio.sleep(WAIT_S)
            finally:
                call.cancel()
        raise not_ready(self.address, timeout_s)

    async def generate(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        on_summary: OnSummary = warn_of_cut_prompts,
        **options: Unpack[GenerateOptions],
    ) -> list[np.ndarray]:
        """As `SamplerClient.generate`."""
        reply = await self.call_generate(raw_request(model, options), timeout_s=timeout_s)
        on_summary(reply.summary)
        return [picture_from(image) for image in reply.images]

    async def call_generate(
        self, request: sampler_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> sampler_pb2.GenerateResponse:
        """As `SamplerClient.call_generate`."""
        seconds = self._seconds(timeout_s)
        with self._calling(request.model, seconds):
            response: sampler_pb2.GenerateResponse = await self._sampler.Generate(request, timeout=seconds)
            return response

    async def generate_stream(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        on_summary: OnSummary = warn_of_cut_prompts,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[tuple[int, np.ndarray], None]:
        """As `SamplerClient.generate_stream`."""
        request = sampler_pb2.GenerateStreamRequest(request=raw_request(model, options))
        read = self._read(self._sampler.GenerateStream, request, self._seconds(timeout_s), model)
        async with aclosing(read) as replies:
            async for reply in replies:
                if reply.HasField("image"):
                    yield reply.image.index, picture_from(reply.image)
                else:
                    on_summary(reply.summary)

    async def render(
        self,
        model: str,
        *,
        azimuth: float = 0.0,
        elevation: float = 30.0,
        radius: float | None = None,
        pose: Any = None,
        timeout_s: float | None = None,
        **options: Unpack[ViewOptions],
    ) -> SeenView:
        """As `SamplerClient.render`."""
        request = render_request(model, orbit(azimuth, elevation, radius), pose, options)
        seconds = self._seconds(timeout_s)
        with self._calling(model, seconds):
            return seen((await self._sampler.Render(request, timeout=seconds)).view)

    async def render_path(
        self,
        model: str,
        *,
        count: int = 60,
        elevation: float = 30.0,
        radius: float | None = None,
        degrees: float = 360.0,
        poses: Iterable[Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[ViewOptions],
    ) -> AsyncGenerator[SeenView, None]:
        """As `SamplerClient.render_path`."""
        start = sampler_pb2.OrbitPath(count=count, start=orbit(0.0, elevation, radius), degrees=degrees)
        request = path_request(model, start, poses, options)
        read = self._read(self._sampler.RenderPath, request, timeout_s, model)
        async with aclosing(read) as replies:
            async for reply in replies:
                if reply.HasField("view"):
                    yield seen(reply.view)

    async def render_progressive(
        self,
        model: str,
        *,
        azimuth: float = 0.0,
        elevation: float = 30.0,
        radius: float | None = None,
        pose: Any = None,
        timeout_s: float | None = None,
        **options: Unpack[ViewOptions],
    ) -> AsyncGenerator[SeenView, None]:
        """As `SamplerClient.render_progressive`."""
        request = progressive_request(model, orbit(azimuth, elevation, radius), pose, options)
        shown: SeenView | None = None
        read = self._read(self._sampler.RenderPath, request, self._seconds(timeout_s), model)
        async with aclosing(read) as replies:
            async for reply in replies:
                if reply.HasField("view"):
                    shown = improved(shown, reply.view, request.options)
                    yield shown

    async def predict(
        self,
        model: str,
        function: str = "",
        *,
        timeout_s: float | None = None,
        bulk: bool = False,
        **arrays: Any,
    ) -> dict[str, np.ndarray]:
        """As `SamplerClient.predict`."""
        request = predict_request(model, function, arrays, bulk=bulk)
        return outputs_of(await self.call_predict(request, timeout_s=timeout_s))

    async def call_predict(
        self, request: sampler_pb2.PredictRequest, *, timeout_s: float | None = None
    ) -> sampler_pb2.PredictResponse:
        """As `SamplerClient.call_predict`."""
        seconds = self._seconds(timeout_s)
        with self._calling(request.model, seconds):
            response: sampler_pb2.PredictResponse = await self._sampler.Predict(request, timeout=seconds)
            return response

    async def models(self, *, all_versions: bool = False) -> list[models_pb2.Model]:
        """As `SamplerClient.models`."""
        with errors_from(self.address):
            request = models_pb2.ListModelsRequest(all_versions=all_versions)
            return list((await self._models.ListModels(request, timeout=self.timeout_s)).models)

    async def model(self, ref: str) -> models_pb2.Model:
        """As `SamplerClient.model`."""
        with errors_from(self.address):
            request = models_pb2.GetModelRequest(model=ref)
            served: models_pb2.Model = (await self._models.GetModel(request, timeout=self.timeout_s)).model
            return served

    async def load(self, ref: str) -> models_pb2.Model:
        """As `SamplerClient.load`."""
        with errors_from(self.address):
            request = models_pb2.LoadModelRequest(model=ref)
            loaded: models_pb2.Model = (await self._models.LoadModel(request, timeout=self.timeout_s)).model
            return loaded

    async def unload(self, ref: str) -> None:
        """As `SamplerClient.unload`."""
        with errors_from(self.address):
            await self._models.UnloadModel(models_pb2.UnloadModelRequest(model=ref), timeout=self.timeout_s)

    async def watch_models(self) -> AsyncGenerator[models_pb2.Model, None]:
        """As `SamplerClient.watch_models`."""
        read = self._read(self._models.WatchModels, models_pb2.WatchModelsRequest())
        async with aclosing(read) as replies:
            async for reply in replies:
                yield reply.model

    def _seconds(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    @contextmanager
    def _calling(self, model: str, seconds: float | None) -> Iterator[None]:
        """Around a call to a model's queue."""
        with errors_from(self.address), self._limits.call(model, seconds):
            yield

    async def _read(
        self, method: Any, request: Any, seconds: float | None = None, model: str | None = None
    ) -> AsyncGenerator[Any, None]:
        """A stream's messages; the call is cancelled when nobody asks for more."""
        with errors_from(self.address) if model is None else self._calling(model, seconds):
            call = method(request, timeout=seconds)
            try:
                async for reply in call:
                    yield reply
            finally:
                call.cancel()

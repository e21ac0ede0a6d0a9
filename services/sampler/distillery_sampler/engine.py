"""Requests to pictures and views: checks, queues, gathers. Knows no gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from distill_core.artifacts import ArtifactStore, ImageSpec
from distill_core.errors import ConfigError
from distillery_sampler.backends.base import Generator, SceneRenderer
from distillery_sampler.beginnings import given
from distillery_sampler.checks import check_view, image_items, image_key
from distillery_sampler.loading import LoadedModel, cores
from distillery_sampler.metrics import Metrics
from distillery_sampler.registry import Registry
from distillery_sampler.requests import GenerateRequest, Picture, Rendered, RenderRequest, Summary
from distillery_sampler.settings import SamplerSettings
from distillery_sampler.views import drop, render_views, terms

Approve = Callable[[ImageSpec, int], None]  # (what a picture is like, how many)


class Engine:
    """One process's models and what can be asked of them."""

    def __init__(
        self, store: ArtifactStore, cache: Path, settings: SamplerSettings, metrics: Metrics
    ) -> None:
        self.settings, self.metrics = settings, metrics
        self.models = Registry(store, cache, settings, metrics)

    async def generate(
        self, request: GenerateRequest, approve: Approve | None = None
    ) -> tuple[list[Picture], Summary]:
        """All pictures of a request, in order. Image i is the same whatever it was batched with."""
        pictures, summary = [], None
        async with aclosing(self.generate_stream(request, approve)) as events:
            async for event in events:
                if isinstance(event, Picture):
                    pictures.append(event)
                else:
                    summary = event
        assert summary is not None
        return sorted(pictures, key=lambda picture: picture.index), summary

    async def generate_stream(
        self, request: GenerateRequest, approve: Approve | None = None
    ) -> AsyncGenerator[Picture | Summary, None]:
        """The pictures of a request, each as soon as it is ready, then the summary.

        `approve` may refuse what the caller could not take, before anything is queued.

        Raises:
            ConfigError, NotFound, ArtifactError: the request or its model is wrong.
            Overloaded, Expired: there is no time for it.
        """
        started = time.perf_counter()
        async with self.models.acquire(request.model) as model:
            manifest = model.manifest
            if not isinstance(model.backend, Generator):
                raise ConfigError(f"{manifest.ref} is a {manifest.kind}; use Render", field="model")
            items = image_items(request, manifest, self.settings)
            key = image_key(request, manifest)
            if approve and manifest.image:
                approve(manifest.image, len(items))
            self._check_size(model, len(items))
            if request.image is not None:  # decoding takes milliseconds: not on the event loop
                found, begin = await asyncio.to_thread(given, request.image, manifest)
                items = [replace(item, given=found) for item in items]
                key = replace(key, begin=begin)
            futures = model.batcher.submit(key, items, **terms(request.call))
            try:
                async for index in _as_ready(futures):
                    yield Picture(index, items[index].seed, futures[index].result())
            finally:
                drop(futures)
            seconds = time.perf_counter() - started
            yield Summary(manifest.ref, model.backend.name, len(items), seconds, key.num_steps, key.guidance)

    async def render(self, request: RenderRequest) -> AsyncGenerator[Rendered | Summary, None]:
        """The views of a request, in order, only a few tiles ahead of who reads them, then the summary."""
        started = time.perf_counter()
        for view in request.views:
            check_view(view, self.settings)
        async with self.models.acquire(request.model) as model:
            if not isinstance(model.backend, SceneRenderer):
                raise ConfigError(
                    f"{model.manifest.ref} is a {model.manifest.kind}; use Generate", field="model"
                )
            async with aclosing(
                render_views(request, model.batcher, self.settings.instances or cores())
            ) as shown:
                async for rendered in shown:
                    yield rendered
            seconds = time.perf_counter() - started
            yield Summary(model.manifest.ref, model.backend.name, len(request.views), seconds)

    async def close(self) -> None:
        """Free all models."""
        await self.models.close()

    def _check_size(self, model: LoadedModel, images: int) -> None:
        if images > model.batcher.max_queue:
            raise ConfigError(
                f"{images} images are more than the queue of {model.batcher.max_queue}; send fewer",
                field="count",
            )


async def _as_ready(futures: list[asyncio.Future[object]]) -> AsyncIterator[int]:
    """Positions of futures as they end."""
    position = {future: index for index, future in enumerate(futures)}
    waiting = set(futures)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for future in sorted(done, key=position.__getitem__):
            yield position[future]

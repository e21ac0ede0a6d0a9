"""Requests to pictures, views and answers of functions: checks, queues, gathers. Knows no gRPC."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.artifacts import ArtifactStore, ImageSpec, Manifest
from distill_core.diffusion.noise import draw_first
from distill_core.errors import ConfigError
from distill_core.kinds.cards import served_by
from distill_core.kinds.denoiser.card import Card
from distillery_sampler.backends.base import Functions, Generator, SceneRenderer
from distillery_sampler.engine.batcher import drop
from distillery_sampler.engine.checks import check_reply, check_view, image_items, image_key
from distillery_sampler.engine.init_images import decode_init_image, decode_small_picture
from distillery_sampler.engine.noise_prefetch import QUICK_VALUES, NoisePrefetch
from distillery_sampler.engine.predict import QUICK_VALUES as QUICK_INPUTS
from distillery_sampler.engine.predict import calls_of, reply_bytes, size_of
from distillery_sampler.engine.requests import (
    Call,
    DecodedImage,
    GenerateRequest,
    ImageInput,
    ImageItem,
    ImageKey,
    InitImageKey,
    Picture,
    PredictRequest,
    Rendered,
    RenderRequest,
    Summary,
)
from distillery_sampler.engine.statistics import packing
from distillery_sampler.engine.views import render_views
from distillery_sampler.metrics import Metrics
from distillery_sampler.models.loading import LoadedModel
from distillery_sampler.models.registry import Registry
from distillery_sampler.settings import SamplerSettings

RPCS = {"generate": "Generate", "render": "Render", "call": "Predict"}
Approve = Callable[[ImageSpec, int], None]  # (what a picture is like, how many)


@dataclass(eq=False)
class _Queued:
    """The images of one request in their model's queue; at the block's end nobody waits for them any more."""

    model: LoadedModel
    key: ImageKey
    items: list[ImageItem]
    futures: list[asyncio.Future[Any]]
    _until: ExitStack

    def __enter__(self) -> _Queued:
        return self

    def __exit__(self, *error: Any) -> None:
        drop(self.futures)
        self._until.__exit__(*error)

    def summary(self, started: float) -> Summary:
        ref, backend, cond = self.model.ref, self.model.backend.name, self.model.card.cond
        seconds, count = time.perf_counter() - started, len(self.items)
        cut, tokens = self._cut_prompts(), (cond.max_tokens if cond else None) or 0
        return Summary(ref, backend, count, seconds, self.key.num_steps, self.key.guidance, cut, tokens)

    def _cut_prompts(self) -> tuple[int, ...]:
        backend = self.model.backend
        assert isinstance(backend, Generator)
        texts_of = [{text for text in (item.prompt, item.negative) if text} for item in self.items]
        cut = {text for text in set().union(*texts_of) if backend.cuts(text)}
        return tuple(index for index, texts in enumerate(texts_of) if texts & cut)


class Engine:
    """One process's models and what can be asked of them."""

    def __init__(
        self, store: ArtifactStore, cache: Path, settings: SamplerSettings, metrics: Metrics
    ) -> None:
        self.settings, self.metrics = settings, metrics
        self.models = Registry(store, cache, settings, metrics)
        self._prefetch = NoisePrefetch()

    async def generate(
        self, request: GenerateRequest, approve: Approve | None = None
    ) -> tuple[list[Picture], Summary]:
        """All pictures of a request, in order. Image i is the same whatever it was batched with.

        `approve` may refuse what the caller could not take, before anything is queued.

        Raises:
            ConfigError, NotFound, ArtifactError: the request or its model is wrong.
            Overloaded, Expired: there is no time for it.
        """
        started = time.perf_counter()
        with await self._queued(request, approve) as queued:
            pixels = [await future for future in queued.futures]
            pictures = [
                Picture(i, item.seed, made) for i, (item, made) in enumerate(zip(queued.items, pixels))
            ]
            return pictures, queued.summary(started)

    async def generate_stream(
        self, request: GenerateRequest, approve: Approve | None = None
    ) -> AsyncGenerator[Picture | Summary, None]:
        """The pictures of a request, each as soon as it is ready, then the summary; `generate` says the rest."""
        started = time.perf_counter()
        with await self._queued(request, approve) as queued:
            async for index in _as_ready(queued.futures):
                yield Picture(index, queued.items[index].seed, queued.futures[index].result())
            summary = queued.summary(started)
        yield summary

    async def _queued(self, request: GenerateRequest, approve: Approve | None) -> _Queued:
        with ExitStack() as until:
            model = until.enter_context(await self.models.acquire(request.model))
            card = model.card
            if not isinstance(model.backend, Generator):
                raise _other_kind(model.manifest)
            items = image_items(request, card, self.settings, model.ref)
            key = image_key(request, card)
            if approve and card.image:
                approve(card.image, len(items))
            self._check_size(model, len(items))
            times = until.enter_context(model.stats.requests.request(len(items)))
            if request.image is not None:  # decoding takes milliseconds: not on the event loop
                decoded, shared = await asyncio.to_thread(_decoded, request.image, card, model.ref)
                items = [replace(item, init_image=decoded) for item in items]
                key = replace(key, init_image=shared)
            times.queued()
            futures = self._submit(model, key, items, request.call)
            return _Queued(model, key, items, futures, until.pop_all())

    def _submit(
        self, model: LoadedModel, key: ImageKey, items: list[ImageItem], call: Call
    ) -> list[asyncio.Future[Any]]:
        """Queue the images; their first noise is drawn while they wait, or just before where nothing runs."""
        image = model.card.image
        assert image is not None, "a denoiser without image is not loaded"
        shape, waits = (image.channels, image.height, image.width), model.batcher.busy
        quick = len(items) * math.prod(shape) <= QUICK_VALUES
        if quick and not waits:
            draw_first(items, shape)
        futures = model.batcher.submit(key, items, **vars(call))
        if quick:
            draw_first(items, shape)
        elif waits:
            self._prefetch.request(items, shape)
        return futures

    async def render(self, request: RenderRequest) -> AsyncGenerator[Rendered | Summary, None]:
        """The views of a request, in order, only a few tiles ahead of who reads them, then the summary."""
        started = time.perf_counter()
        for view in request.views:
            check_view(view, self.settings)
        with await self.models.acquire(request.model) as model:
            if not isinstance(model.backend, SceneRenderer):
                raise _other_kind(model.manifest)
            instances = model.tuned.layout.instances
            with model.stats.requests.request(len(request.views)):
                async with aclosing(render_views(request, model.batcher, instances)) as shown:
                    async for rendered in shown:
                        yield rendered
            seconds = time.perf_counter() - started
            yield Summary(model.manifest.ref, model.backend.name, len(request.views), seconds)

    async def predict(self, request: PredictRequest) -> tuple[dict[str, np.ndarray], Summary]:
        """Outputs of one of a model's functions, (B, …) each, by name. Item i is the same whatever it was batched with.

        Raises:
            ConfigError, NotFound, ArtifactError: the request or its model is wrong.
            Overloaded, Expired: there is no time for it.
        """
        started = time.perf_counter()
        with await self.models.acquire(request.model) as model:
            manifest = model.manifest
            if not isinstance(model.backend, Functions):
                raise _other_kind(manifest)
            if size_of(request.inputs) > QUICK_INPUTS:
                calls = await asyncio.to_thread(calls_of, request, manifest, self.settings)
            else:
                calls = calls_of(request, manifest, self.settings)
            self._check_size(model, len(calls.payloads), "items", "inputs")
            with model.stats.requests.request(calls.count, model.stats.of(calls.key.function)) as times:
                times.queued()
                futures = model.batcher.submit(calls.key, calls.payloads, **vars(request.call))
                try:
                    answers = [await future for future in futures]
                finally:
                    drop(futures)
                with packing():
                    outputs = calls.joined(answers)
                check_reply(1, reply_bytes(outputs), self.settings, field="inputs", stream="smaller requests")
            seconds = time.perf_counter() - started
            return outputs, Summary(manifest.ref, model.backend.name, calls.count, seconds)

    async def close(self) -> None:
        """Free all models."""
        await self.models.close()
        self._prefetch.close()

    def _check_size(self, model: LoadedModel, count: int, what: str = "images", field: str = "count") -> None:
        if count > model.batcher.max_queue:
            raise ConfigError(
                f"{count} {what} are more than the queue of {model.batcher.max_queue}; send fewer",
                field=field,
            )


def _decoded(wish: ImageInput, card: Card, ref: str) -> tuple[DecodedImage, InitImageKey | None]:
    """The picture of a request, and how sampling starts from it; a model that enlarges starts from noise."""
    if card.cond is not None and card.cond.factor is not None:
        return decode_small_picture(wish, card, ref), None
    return decode_init_image(wish, card, ref)


def _other_kind(manifest: Manifest) -> ConfigError:
    """The refusal of a call that a kind of model does not answer; names the one that it does."""
    return ConfigError(f"{manifest.ref} is a {manifest.kind}; use {RPCS[served_by(manifest)]}", field="model")


async def _as_ready(futures: list[asyncio.Future[object]]) -> AsyncIterator[int]:
    """Positions of futures as they end."""
    position = {future: index for index, future in enumerate(futures)}
    waiting = set(futures)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for future in sorted(done, key=position.__getitem__):
            yield position[future]

"""From a version in the store to a warm model: verified, loaded, tried once, its best batch size measured."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError
from distillery_sampler.backends.base import Backend, Generator
from distillery_sampler.backends.opening import choose, open_backend
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.batcher import Batcher
from distillery_sampler.metrics import Metrics, ModelStats
from distillery_sampler.requests import ImageItem, ImageKey, Orbit, Region, Tile, View
from distillery_sampler.settings import SamplerSettings
from distillery_sampler.views import TILE_RAYS

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
WORTH_IT = 1.1  # a larger batch must bring so many times the images per second: it also costs latency
MAX_TILES = 64  # in a batch, whose pixels are those of one full tile at most
TRIAL_SIDE = 16  # pixels of the view that warms a scene
TRIAL_S = 0.5  # no larger batch is tried after one that took longer


class Opened(NamedTuple):
    manifest: Manifest
    backend: Backend
    max_batch: int
    seconds: float  # an image of one step, or a view of one pixel, takes about so long


@dataclass(eq=False)
class LoadedModel:
    """A version that answers. `users` counts requests that hold it: it is freed only when nobody does."""

    manifest: Manifest
    backend: Backend
    batcher: Batcher
    stats: ModelStats
    pinned: bool = False  # asked for by number: stays when aliases move on
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    _free: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def used(self) -> Iterator[LoadedModel]:
        """Keep the model alive inside the block."""
        self.users += 1
        self.stats.metrics.inflight.inc()
        try:
            yield self
        finally:
            self.users -= 1
            self.stats.metrics.inflight.dec()
            self.last_used = time.monotonic()
            if not self.users:
                self._free.set()

    async def retire(self) -> None:
        """Wait until nobody uses the model, then free it."""
        while self.users:
            self._free.clear()
            await self._free.wait()
        await self.batcher.close()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_model(store: ArtifactStore, ref: str, weights: SharedWeights, settings: SamplerSettings) -> Opened:
    """Fetch, verify, load and warm a version; runs in a thread.

    Raises:
        ArtifactError: damaged, not servable, or it answers with NaN.
        Unavailable: a package or device is missing.
    """
    manifest = store.manifest(ref)
    name = choose(manifest, settings.backend)
    folder = weights.fetch(ref)
    instances = settings.instances or cores()
    threads = max(1, cores() // instances)
    backend = open_backend(folder, manifest, name, device=settings.device, threads=threads, weights=weights)
    return Opened(manifest, backend, *_warm(backend, manifest, settings.max_batch))


def _warm(backend: Backend, manifest: Manifest, max_batch: int | None) -> tuple[int, float]:
    """Answer once, so that no caller waits for it; the best batch, and its seconds per image."""
    if isinstance(backend, Generator):
        _trial(backend, manifest, 1)
        return _best_batch(backend, manifest, (max_batch,) if max_batch else BATCH_SIZES)
    started = time.perf_counter()
    view = View(TRIAL_SIDE, TRIAL_SIDE, orbit=Orbit(30.0, 30.0))
    (seen,) = backend.render([Tile(view, Region(range(TRIAL_SIDE)))])
    _check_finite(manifest, seen.rgb)
    return max_batch or MAX_TILES, (time.perf_counter() - started) / TRIAL_SIDE**2


def _best_batch(backend: Generator, manifest: Manifest, sizes: tuple[int, ...]) -> tuple[int, float]:
    best, rate = 1, 0.0
    for size in sizes:
        seconds = min(_trial(backend, manifest, size) for _ in range(2))
        if size / seconds > rate * WORTH_IT:
            best, rate = size, size / seconds
        if seconds > TRIAL_S:
            break
    return best, 1 / rate


def _trial(backend: Generator, manifest: Manifest, images: int) -> float:
    started = time.perf_counter()
    items = [ImageItem(seed=0, index=index, class_label=0, prompt="") for index in range(images)]
    _check_finite(manifest, backend.generate(ImageKey(num_steps=1, guidance=1.0), items))
    return time.perf_counter() - started


def _check_finite(manifest: Manifest, pixels: np.ndarray) -> None:
    if not np.isfinite(pixels).all():
        raise ArtifactError(f"{manifest.ref} answers with NaN or infinity; publish it again")


def start_model(opened: Opened, metrics: Metrics, settings: SamplerSettings) -> LoadedModel:
    """Put a warm model behind a queue."""
    manifest, backend, max_batch, seconds = opened
    stats = ModelStats(metrics, (manifest.name, str(manifest.version), backend.name))
    batcher = Batcher(
        _runner(backend),
        stats,
        max_batch=max_batch,
        max_queue=settings.max_queue_images,
        instances=settings.instances or cores(),
        max_delay_s=settings.max_delay_s,
        max_cost=math.inf if isinstance(backend, Generator) else TILE_RAYS,
        cost=_cost,
        kind=_kind(manifest),
        seconds_per_cost=seconds,
    )
    return LoadedModel(manifest, backend, batcher, stats)


def _cost(key: Any, payload: Any) -> float:
    """Steps of an image, doubled by guidance; pixels of a tile."""
    if isinstance(payload, Tile):
        return payload.rays
    return key.num_steps * (1 if key.guidance == 1 else 2)


def _kind(manifest: Manifest) -> Callable[[Any], Any]:
    """The part of an image, where its class decides it: a batch of one part is as fast as one of a plain model."""
    partition = manifest.partition
    if partition is None or partition.kind != "class_label":
        return lambda _item: None
    table = partition.table  # its last row is that of all labels outside it
    return lambda item: table[min(item.class_label, len(table) - 1)]


def _runner(backend: Backend) -> Any:
    if isinstance(backend, Generator):
        return lambda key, items: list(backend.generate(key, items))
    return lambda key, tiles: backend.render(tiles, normals=key.normals)

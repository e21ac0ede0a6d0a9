"""From a version in the store to a warm model: verified, loaded, tried once, its best batch and threads measured."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import structlog

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.diffusion.super_resolution import small_shape
from distill_core.errors import ArtifactError, DistilleryError, Unavailable, out_of_memory
from distill_core.kinds.cards import generator_card
from distill_core.kinds.denoiser.card import Card
from distill_core.probe import SEED, VIEW_DEGREES, VIEW_SIDE, probe_picture
from distillery_sampler.backends.base import Backend, Functions, Generator, SceneRenderer
from distillery_sampler.backends.fixed import Padded, PaddedFunctions
from distillery_sampler.backends.opening import Choice, choices, open_backend
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.engine.batcher import Batcher
from distillery_sampler.engine.predict import cost_by, runner
from distillery_sampler.engine.requests import (
    DecodedImage,
    ImageItem,
    ImageKey,
    ModelInfo,
    Orbit,
    Region,
    Tile,
    View,
)
from distillery_sampler.engine.statistics import ModelStats
from distillery_sampler.engine.views import TILE_RAYS
from distillery_sampler.metrics import Metrics
from distillery_sampler.models.memory import Held, resident, total
from distillery_sampler.models.probing import answer_probes
from distillery_sampler.models.tuning import Tuned, WarmUpRequest, layouts, tune, warm
from distillery_sampler.settings import SamplerSettings

MAX_TILES = 64  # in a batch, whose pixels are those of one full tile at most
# of the probe picture, by precision, in [-1, 1]
DIFFERENCE = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.1, "int8": 0.25}
# A model takes no more than so many times its files and so much: what the process grew by beyond is another model's,
# loaded at the same moment.
MOST_OF_FILES, SLACK = 3, 32 * 2**20
SCENE_DIFFERENCE = 0.05  # a refined grid leaves out the thinnest fog
_log = structlog.get_logger("distillery.sampler")


class Opened(NamedTuple):
    manifest: Manifest
    backend: Backend
    tuned: Tuned  # of a scene: an image is a pixel
    grown: int  # bytes that the process grew by


@dataclass(eq=False)
class LoadedModel:
    """A version that answers. `users` counts requests that hold it: it is freed only when nobody does."""

    manifest: Manifest
    backend: Backend
    batcher: Batcher
    stats: ModelStats
    tuned: Tuned
    grown: int  # bytes that the process grew by when it was loaded
    by_number: bool = False  # asked for by its version's number: stays when aliases move on
    replaced_at: float | None = None  # when its alias moved on; monotonic time
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    _free: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """What each request asks of the manifest is read from it once."""
        self.ref, self.card = self.manifest.ref, generator_card(self.manifest)

    def __enter__(self) -> LoadedModel:
        """Keep the model alive inside the block."""
        self.users += 1
        self.stats.metrics.inflight.inc()
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        self.stats.metrics.inflight.dec()
        self.last_used = time.monotonic()
        if not self.users:
            self._free.set()

    def held(self) -> Held:
        """Bytes by what holds them. A runtime's own copies and arenas show only in how the process grew."""
        known = self.backend.held()
        if self.backend.on_gpu or self.backend.name == "torch":
            return known
        files = sum(known.values())
        beyond = max(0, min(self.grown, MOST_OF_FILES * files + SLACK) - files)
        return {**known, ("beyond its files", id(self)): beyond}

    def figures(self) -> dict[str, Any]:
        """Figures that were measured when it was loaded, by name."""
        return {
            "backend": self.backend.name,
            **self.tuned.layout._asdict(),
            "max_batch": self.tuned.max_batch,
            "memory": total([self.held()]),
        }

    def info(self, aliases: tuple[str, ...]) -> ModelInfo:
        """Facts of it for a client."""
        return ModelInfo(self.manifest, "ready", aliases, **self.figures())

    async def retire(self) -> None:
        """Wait until nobody uses the model, then free it."""
        while self.users:
            self._free.clear()
            await self._free.wait()
        await self.batcher.close()


def open_model(
    store: ArtifactStore,
    ref: str,
    weights: SharedWeights,
    settings: SamplerSettings,
    tuned: Tuned | None = None,
) -> Opened:
    """Fetch, verify, load, compare and warm a version; runs in a thread. `tuned` is what an earlier load found.

    Raises:
        ArtifactError: damaged, not servable, or it answers with NaN or otherwise than when it was published.
        Unavailable: a package or device is missing.
    """
    before = resident()
    manifest = store.manifest(ref)
    options = choices(manifest, settings)
    folder = weights.fetch(ref)

    def opened(choice: Choice, threads: int) -> Any:
        return open_backend(folder, manifest, choice, threads=threads, settings=settings, weights=weights)

    first = tuned.layout if tuned else layouts(settings, on_gpu=settings.device.startswith("cuda"))[0]
    choice, backend = _first_that_opens(options, manifest, lambda one: opened(one, first.threads))
    if isinstance(backend, Generator):
        request = _warm_up_request(manifest)
        _compare(manifest, _first_image(backend, request, manifest), DIFFERENCE[choice.precision])
        if tuned is None:
            backend, tuned = tune(backend, partial(opened, choice), request, settings)
        if isinstance(backend, Padded) and backend.on_gpu:
            warm(backend, request, tuned.max_batch, backend.sizes)
    elif isinstance(backend, Functions):
        tuned = answer_probes(backend, folder, manifest, choice.precision, settings)
    else:
        tuned = _look(backend, manifest, settings)
    return Opened(manifest, backend, tuned, resident() - before)


def _first_that_opens(
    options: list[Choice], manifest: Manifest, opened: Callable[[Choice], Backend]
) -> tuple[Choice, Backend]:
    """Engines that fit no more and cannot be built are passed over, with a sentence; the last option must open."""
    *engines, last = options
    for choice, instead in zip(engines, options[1:]):
        try:
            return choice, opened(choice)
        except (ArtifactError, Unavailable) as error:
            others = {"target": choice.target, "instead": instead.target, "error": str(error)}
            _log.warning("engines do not run here, another export is used", model=manifest.ref, **others)
    return last, opened(last)


def _warm_up_request(manifest: Manifest) -> WarmUpRequest:
    """Request that the probe picture was made with; for older versions what it would be."""
    card = generator_card(manifest)
    parity, cond, sampler = manifest.parity, card.cond, card.sampler
    assert cond is not None
    assert sampler is not None
    small = _probe_image(card)
    if parity is not None:
        item = ImageItem(parity.seed, class_label=parity.class_label, prompt=parity.prompt, init_image=small)
        return WarmUpRequest(ImageKey(parity.num_steps, guidance=1.0), item)
    label, prompt = (0 if cond.kind == "class_label" else None), ("" if cond.kind == "prompt" else None)
    return WarmUpRequest(
        ImageKey(sampler.fewest_steps, guidance=1.0),
        ImageItem(SEED, class_label=label, prompt=prompt, init_image=small),
    )


def _probe_image(card: Card) -> DecodedImage | None:
    """The small picture that a model which enlarges makes its probe of; None for others."""
    if card.cond is None or card.cond.factor is None:
        return None
    assert card.image is not None, "a denoiser without image is not loaded"
    return DecodedImage(probe_picture(small_shape(card.image.picture, card.cond.factor)), None)


def _first_image(backend: Generator, request: WarmUpRequest, manifest: Manifest) -> np.ndarray:
    """A model's first picture: damaged graphs can open, and fail only when they run."""
    try:
        image: np.ndarray = backend.generate(request.key, [request.item])[0]
        return image
    except DistilleryError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{manifest.ref} cannot answer: {reason}; publish it again") from error


def _look(backend: SceneRenderer, manifest: Manifest, settings: SamplerSettings) -> Tuned:
    """Answer one small view, so that no caller waits for it."""
    started = time.perf_counter()
    view = View(VIEW_SIDE, VIEW_SIDE, orbit=Orbit(VIEW_DEGREES, VIEW_DEGREES))
    (seen,) = backend.render([Tile(view, Region(range(VIEW_SIDE)))])
    _compare(manifest, seen.rgb.transpose(2, 0, 1), SCENE_DIFFERENCE)
    seconds = (time.perf_counter() - started) / VIEW_SIDE**2
    return Tuned(layouts(settings, on_gpu=backend.on_gpu)[0], settings.max_batch or MAX_TILES, seconds)


def _compare(manifest: Manifest, picture: np.ndarray, allowed: float) -> None:
    if not np.isfinite(picture).all():
        raise ArtifactError(f"{manifest.ref} answers with NaN or infinity; publish it again")
    difference = manifest.parity.difference(picture) if manifest.parity else 0.0
    if difference > allowed:
        raise ArtifactError(
            f"{manifest.ref} answers differently than when it was published: its probe picture is off by "
            f"{difference:.2g}, and {allowed:g} is allowed; convert or publish it again"
        )


def start_model(opened: Opened, metrics: Metrics, settings: SamplerSettings) -> LoadedModel:
    """Put a warm model behind a queue."""
    manifest, backend, tuned, grown = opened
    stats = ModelStats(metrics, (manifest.name, str(manifest.version), backend.name))
    if isinstance(backend, Padded | PaddedFunctions):
        backend.on_padding = stats.padding
    batcher = Batcher(
        stats.counting(_runner(backend)),
        stats,
        max_batch=tuned.max_batch,
        max_queue=settings.max_queue_images,
        instances=tuned.layout.instances,
        max_delay_s=settings.max_delay_s,
        max_cost=TILE_RAYS if isinstance(backend, SceneRenderer) else math.inf,
        cost=cost_by(manifest.signature) if isinstance(backend, Functions) else _cost,
        partition=_partition(manifest),
        seconds_per_cost=tuned.seconds,
    )
    return LoadedModel(manifest, backend, batcher, stats, tuned, grown)


def _cost(key: Any, payload: Any) -> float:
    """Steps of an image, doubled by guidance; pixels of a tile."""
    if isinstance(payload, Tile):
        return payload.rays
    steps: int = key.num_steps
    return steps * (1 if key.guidance == 1 else 2)


def _partition(manifest: Manifest) -> Callable[[Any], Any]:
    """The part of an image, where its class decides it: a batch of one part is as fast as one of a plain model."""
    partition = generator_card(manifest).partition
    if partition is None or partition.kind != "class_label":
        return lambda _item: None
    table = partition.table  # its last row is that of all labels outside it
    return lambda item: table[min(item.class_label, len(table) - 1)]


def _runner(backend: Backend) -> Any:
    if isinstance(backend, Generator):
        return lambda key, items: list(backend.generate(key, items))
    if isinstance(backend, Functions):
        return runner(backend)
    return lambda key, tiles: backend.render(tiles, normals=key.normals)

"""Best use of a device by a model, measured by timing when it is loaded: instances, threads, images in a batch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import structlog

from distillery_sampler.backends.base import Generator
from distillery_sampler.engine.requests import ImageItem, ImageKey
from distillery_sampler.settings import SamplerSettings

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
WORTH_IT = (
    1.02  # so many times the images per second for a doubled batch, or it stays small: it costs latency
)
LAYOUT_WORTH_IT = 1.1
QUEUE_S = 0.0006  # what a batch costs beside the model: taking it from the queue, handing its images out
ENOUGH_S = 1.0  # of timing: what was not tried by then stays untried
REPEATS = 2
_log = structlog.get_logger("distillery.sampler")


class Layout(NamedTuple):
    """So many batches at a time, each on so many threads."""

    instances: int
    threads: int


class Tuned(NamedTuple):
    """A layout, the images of its batches, and how long an image of one step then takes in one of its instances."""

    layout: Layout
    max_batch: int
    seconds: float


class WarmUpRequest(NamedTuple):
    """Warm-up request: what a generator makes when it is loaded, and while it is timed."""

    key: ImageKey
    item: ImageItem


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def layouts(settings: SamplerSettings, *, on_gpu: bool) -> list[Layout]:
    """Those that the settings leave open: on a CPU one thread a batch, or one batch on all cores."""
    here = 1 if on_gpu else cores()
    if settings.instances or settings.threads:
        instances = settings.instances or max(1, here // (settings.threads or 1))
        return [Layout(instances, settings.threads or max(1, here // instances))]
    return list(dict.fromkeys([Layout(here, 1), Layout(1, here)]))


def tune(
    generator: Generator,
    reopen: Callable[[int], Generator],
    request: WarmUpRequest,
    settings: SamplerSettings,
) -> tuple[Generator, Tuned]:
    """The best layout and batch, and the generator opened for it.

    `generator` was opened with the threads of the first layout and has answered once; `reopen(threads)` opens
    it with others. Of equals the earlier layout and the smaller batch win.
    """
    open_layouts = layouts(settings, on_gpu=generator.on_gpu)
    until = time.perf_counter() + (math.inf if generator.on_gpu else ENOUGH_S)
    best = _best_batch(generator, open_layouts[0], request, settings, until)
    for layout in open_layouts[1:]:
        if time.perf_counter() > until:
            break
        other = reopen(layout.threads)
        candidate = _best_batch(other, layout, request, settings, until)
        if _rate(candidate) > _rate(best) * LAYOUT_WORTH_IT:
            best, generator = candidate, other
    return generator, best


def warm(generator: Generator, request: WarmUpRequest, max_batch: int, buckets: Sequence[int]) -> None:
    """Run every size that batches up to `max_batch` are filled up to, so that no caller waits for its first time."""
    largest = next((size for size in buckets if size >= max_batch), buckets[-1])
    for size in buckets:
        if size <= largest:
            generator.generate(request.key, [request.item] * size)


def _rate(tuned: Tuned) -> float:
    return tuned.layout.instances / (tuned.seconds + QUEUE_S / tuned.max_batch)


def _is_worth_it(candidate: Tuned, best: Tuned) -> bool:
    doublings = math.log2(candidate.max_batch / best.max_batch)
    threshold: float = _rate(best) * WORTH_IT**doublings
    return _rate(candidate) > threshold


def _best_batch(
    generator: Generator, layout: Layout, request: WarmUpRequest, settings: SamplerSettings, until: float
) -> Tuned:
    steps = request.key.num_steps
    best: Tuned | None = None
    with ThreadPoolExecutor(layout.instances) as pool:
        for size in (settings.max_batch,) if settings.max_batch else settings.buckets or BATCH_SIZES:
            batch = [request.item] * size
            try:
                seconds = min(_timed(pool, layout.instances, generator, request.key, batch)) / steps
            except (
                Exception
            ) as error:  # runtimes share no base class: out of memory, or beyond an engine's profile
                if best is None:
                    raise
                _log.info("larger batches do not run", images=size, error=str(error).partition("\n")[0])
                break
            candidate = Tuned(layout, size, seconds / size)
            if best is None or (seconds <= settings.max_batch_s and _is_worth_it(candidate, best)):
                best = candidate
            if seconds > settings.max_batch_s or time.perf_counter() > until:
                break
    assert best is not None, "one size at least is tried"
    return best


def _timed(
    pool: ThreadPoolExecutor, instances: int, generator: Generator, key: ImageKey, batch: list[ImageItem]
) -> Iterator[float]:
    """Seconds of one batch in each instance, all at once; a slow one is not repeated."""
    for _ in range(REPEATS):
        started = time.perf_counter()
        for done in [pool.submit(generator.generate, key, batch) for _ in range(instances)]:
            done.result()
        seconds = time.perf_counter() - started
        yield seconds
        if seconds > ENOUGH_S / 2:
            return

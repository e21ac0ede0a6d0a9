"""Times of a model's requests, by Triton's definitions: counted per request, over all since the version was loaded.

A request's time is that of its decoding (`compute_input`), the time in which a batch with one of its images or tiles
ran (`compute_infer`), the time in which none ran and one waited (`queue`), and that of its packing (`compute_output`).
What a device needs to take in noise and to hand out pixels belongs to `compute_infer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from distill_core.errors import ConfigError
from distill_service.tracing import Tracing, tracing
from distillery_sampler.engine.requests import CallKey
from distillery_sampler.metrics import MODEL, REJECTIONS, RELEASES, Labels, Metrics

MAX_SPANS = 64
_current: ContextVar[RequestTimes | None] = ContextVar("distillery_request_times", default=None)


@dataclass
class Duration:
    """Count, and seconds in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.seconds += seconds


@dataclass
class RequestStats:
    """The requests of one loaded version that passed its checks."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)  # refused as overloaded, expired, cancelled, or broken
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)  # by images, or tiles of views, in a batch
    inferences: int = 0  # pictures and views that were answered
    last_ms: int = 0  # of the Unix epoch: when the last request ended

    def ran(self, size: int, seconds: float) -> None:
        """Record a batch."""
        self.batches.setdefault(size, Duration()).add(seconds)

    def request(self, inferences: int, also: RequestStats | None = None) -> RequestTimes:
        """Around a request for so many pictures, views or items: its end is recorded, here and in `also`."""
        return RequestTimes([self] if also is None else [self, also], inferences)


class RequestTimes:
    """When one request's images or tiles waited and ran; seconds of `time.perf_counter`."""

    def __init__(self, stats: list[RequestStats], inferences: int) -> None:
        self._stats, self._inferences = stats, inferences
        self._began, self._ended = time.perf_counter(), False
        self.all, self.run = _Covered(), _Covered()  # from queueing to the batch's end; of that, in a batch
        self.input_s = 0.0

    def __enter__(self) -> RequestTimes:
        _current.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if not issubclass(kind, ConfigError):  # the request was wrong: that says nothing of the model
                seconds = self.end()
                for stats in self._stats:
                    stats.fail.add(seconds)
            return
        seconds, waited, infer = self.end(), self.all.seconds, self.run.seconds
        for stats in self._stats:
            stats.success.add(seconds)
            stats.inferences += self._inferences
            stats.queue.add(waited - infer)
            stats.compute_input.add(self.input_s)
            stats.compute_infer.add(infer)
            stats.compute_output.count += 1

    def queued(self) -> None:
        """Say that everything is decoded."""
        self.input_s = time.perf_counter() - self._began

    def ran(self, wait_s: float, seconds: float) -> None:
        """An image or tile waited and then ran, until now."""
        now = time.perf_counter()
        self.all.add(now - seconds - wait_s, now)
        self.run.add(now - seconds, now)

    def end(self) -> float:
        """Seconds that the request took."""
        self._ended = True
        for stats in self._stats:
            stats.last_ms = time.time_ns() // 1_000_000
        return time.perf_counter() - self._began

    def packed(self, seconds: float) -> None:
        """Pictures were packed, before the request's end or right after it."""
        for stats in self._stats:
            stats.compute_output.seconds += seconds
            if self._ended:
                stats.success.seconds += seconds


class _Covered:
    """The time that spans cover together, where each ends no earlier than those before it."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # apart from each other
        self._settled = 0.0  # of older ones, which no later one reaches back to

    def add(self, start: float, end: float) -> None:
        while self._spans and self._spans[-1][1] >= start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))
        if len(self._spans) > MAX_SPANS:
            first = self._spans.pop(0)
            self._settled += first[1] - first[0]

    @property
    def seconds(self) -> float:
        return self._settled + sum(end - start for start, end in self._spans)


def current_request() -> RequestTimes | None:
    """The request that queues now."""
    return _current.get()


@dataclass
class ModelStats:
    """Figures of what one loaded version did so far, for Prometheus and for KServe's ModelStatistics."""

    metrics: Metrics
    labels: Labels
    requests: RequestStats = field(default_factory=RequestStats)
    traced: Tracing | None = field(default_factory=tracing)
    functions: dict[str, RequestStats] = field(default_factory=dict)  # of those that were called

    def __post_init__(self) -> None:
        """Series are looked up once, not for each image, and are there before the first one."""
        metrics, labels = self.metrics, self.labels
        metrics.on_loaded(labels)
        self._queue_seconds = metrics.queue_seconds.labels(*labels)
        self._infer_seconds = metrics.infer_seconds.labels(*labels)
        self._batch_images = metrics.batch_images.labels(*labels)
        self._padding = metrics.padding_images.labels(*labels)
        self._queued = metrics.queue_images.labels(*labels)
        self._releases = {reason: metrics.batch_release.labels(*labels, reason) for reason in RELEASES}
        self._rejections = {reason: metrics.rejected.labels(*labels, reason) for reason in REJECTIONS}

    def origin(self) -> Any:
        """The request that queues, for its times, and its span; None without tracing."""
        return current_request(), None if self.traced is None else self.traced.origin()

    def batch(self, images: int, reason: str, waits: list[float], seconds: float, origins: list[Any]) -> None:
        """Record a batch."""
        self.requests.ran(images, seconds)
        for (request, _), wait in zip(origins, waits, strict=True):
            if request is not None:
                request.ran(wait, seconds)
        self._batch_images.observe(images)
        self._releases[reason].inc()
        self._infer_seconds.observe(seconds)
        for wait in waits:
            self._queue_seconds.observe(wait)
        if self.traced is not None:
            names = dict(zip(MODEL, self.labels, strict=True))
            spans = [span for _, span in origins]
            self.traced.batch(spans, waits, seconds, {**names, "images": images, "reason": reason})

    def of(self, function: str) -> RequestStats:
        """The requests of one function; "" is all of the model's."""
        return self.functions.setdefault(function, RequestStats()) if function else self.requests

    def counting(self, run: Callable[[Any, list[Any]], Any]) -> Callable[[Any, list[Any]], Any]:
        """`run`, whose batches are recorded by the function that they call, too."""

        def counted(key: Any, payloads: list[Any]) -> Any:
            started = time.perf_counter()
            answers = run(key, payloads)
            if isinstance(key, CallKey):
                self.of(key.function).ran(len(payloads), time.perf_counter() - started)
            return answers

        return counted

    def padding(self, images: int) -> None:
        """Record images that only filled a batch up to a fixed size."""
        self._padding.inc(images)

    def queue(self, images: int) -> None:
        """Record the queue's length."""
        self._queued.set(images)

    def rejected(self, reason: str) -> None:
        """Record work that was refused or dropped."""
        self._rejections[reason].inc()


class packing:  # noqa: N801 - used as a function
    """Around what makes an answer of pixels."""

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        times = _current.get()
        if times is not None and kind is None:
            times.packed(time.perf_counter() - self._started)

"""Metrics of the sampler for Prometheus. Labels are models, versions and backends, never requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from distill_service.metrics import SECONDS
from distill_service.tracing import Tracing, tracing
from distillery_sampler.engine.requests import CallKey
from distillery_sampler.engine.statistics import RequestStats, current_request

IMAGES = (1, 2, 4, 8, 16, 32, 64)
MODEL = ("model", "version", "backend")
RELEASES = ("full", "idle", "delay")
REJECTIONS = ("queue", "client_share", "deadline")
Labels = tuple[str, str, str]  # model, version, backend


class Metrics:
    """One sampler's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"distillery_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"distillery_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(f"distillery_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests_total", "Calls that ended.", ("method", "code"))
        self.request_seconds = histogram("request_seconds", "From a call to its end.", ("method",))
        self.queue_seconds = histogram("queue_seconds", "An image's wait for a device.", MODEL)
        self.infer_seconds = histogram("infer_seconds", "One batch on the device.", MODEL)
        self.encode_seconds = histogram("encode_seconds", "Packing one picture.", ("format",))
        self.batch_images = histogram("batch_images", "Images in a batch.", MODEL, IMAGES)
        self.batch_release = counter("batch_release_total", "Why a batch left.", (*MODEL, "reason"))
        self.padding_images = counter(
            "padding_images_total", "Images computed only to fill a batch up to a fixed size.", MODEL
        )
        self.queue_images = gauge("queue_images", "Images waiting.", MODEL)
        self.inflight = gauge("inflight", "Requests being worked on.")
        self.rejected = counter("rejected_total", "Refused or dropped before a device.", (*MODEL, "reason"))
        self.model_info = gauge("model_info", "1 for each loaded version.", (*MODEL, "kind", "method"))
        self.model_load_seconds = histogram("model_load_seconds", "Fetch, verify, load, warm.", ("model",))
        self.model_reload = counter("model_reload_total", "Loads by result.", ("model", "result"))
        self._found = {  # by the names of `LoadedModel.figures`
            "instances": gauge("model_instances", "Batches of a model that run at the same time.", MODEL),
            "threads": gauge("model_threads", "Threads of each of them.", MODEL),
            "max_batch": gauge("model_max_batch", "Images in a batch at most.", MODEL),
            "memory": gauge("model_memory_bytes", "What a model takes, with what it shares.", MODEL),
        }
        self._retired: dict[str, Labels] = {}  # by model: the version that left last
        self._of_call = cache(self._series_of_call)  # looking series up takes longer than counting

    def on_call(self, method: str, code: str, seconds: float) -> None:
        """Count a call that ended."""
        requests, request_seconds = self._of_call(method, code)
        requests.inc()
        request_seconds.observe(seconds)

    def _series_of_call(self, method: str, code: str) -> tuple[Counter, Histogram]:
        short = method.lstrip("/").replace("/", ".")
        return self.requests.labels(short, code), self.request_seconds.labels(short)

    def on_loaded(self, labels: Labels) -> None:
        """A version answers: its series are kept."""
        if self._retired.get(labels[0]) == labels:
            del self._retired[labels[0]]

    def show(self, labels: Labels, figures: Mapping[str, Any]) -> None:
        """Say how a loaded version uses its device, and its memory, as `LoadedModel.figures` has them."""
        for name, metric in self._found.items():
            metric.labels(*labels).set(figures[name])

    def hide(self, labels: Labels) -> None:
        """A version is loaded no more."""
        for metric in self._found.values():
            metric.remove(*labels)

    def on_retired(self, labels: Labels) -> None:
        """A version left: its figures stay until the next one of its model leaves, so that their number is bounded."""
        before = self._retired.get(labels[0])
        self._retired[labels[0]] = labels
        if before is None or before == labels:
            return
        for metric in (
            self.queue_seconds,
            self.infer_seconds,
            self.batch_images,
            self.padding_images,
            self.queue_images,
        ):
            metric.remove(*before)
        for metric, reasons in ((self.batch_release, RELEASES), (self.rejected, REJECTIONS)):
            for reason in reasons:
                metric.remove(*before, reason)


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

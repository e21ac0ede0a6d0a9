"""Metrics of the sampler for Prometheus. Labels are models, versions and backends, never requests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from distill_service.metrics import SECONDS

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

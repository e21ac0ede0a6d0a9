"""What Prometheus sees of the sampler. Labels are models, versions and backends, never requests."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from distill_core.errors import ConfigError

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IMAGES = (1, 2, 4, 8, 16, 32, 64)
MODEL = ("model", "version", "backend")


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
        self.queue_images = gauge("queue_images", "Images waiting.", MODEL)
        self.inflight = gauge("inflight", "Requests being worked on.")
        self.rejected = counter("rejected_total", "Refused or dropped before a device.", (*MODEL, "reason"))
        self.model_info = gauge("model_info", "1 for each loaded version.", (*MODEL, "kind", "method"))
        self.model_load_seconds = histogram("model_load_seconds", "Fetch, verify, load, warm.", ("model",))
        self.model_reload = counter("model_reload_total", "Loads by result.", ("model", "result"))

    def on_call(self, method: str, code: str, seconds: float) -> None:
        """Count a call that ended."""
        short = method.lstrip("/").replace("/", ".")
        self.requests.labels(short, code).inc()
        self.request_seconds.labels(short).observe(seconds)

    def serve(self, host: str, port: int) -> None:
        """Serve `/metrics`; port 0 is off.

        Raises:
            ConfigError: the port is in use.
        """
        if port == 0:
            return
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served on {host}:{port}: {error.strerror}; "
                "set DISTILLERY_SAMPLER_METRICS_PORT to a free port, or to 0 for none",
                field="sampler_metrics_port",
            ) from None


@dataclass
class ModelStats:
    """What one loaded version did so far, for Prometheus and for KServe's ModelStatistics."""

    metrics: Metrics
    labels: tuple[str, str, str]
    images: int = 0
    batches: int = 0
    failures: int = 0
    queue_s: float = 0.0
    infer_s: float = 0.0

    def batch(self, images: int, reason: str, waits: list[float], seconds: float) -> None:
        """Record a batch."""
        self.images += images
        self.batches += 1
        self.queue_s += sum(waits)
        self.infer_s += seconds
        self.metrics.batch_images.labels(*self.labels).observe(images)
        self.metrics.batch_release.labels(*self.labels, reason).inc()
        self.metrics.infer_seconds.labels(*self.labels).observe(seconds)
        for wait in waits:
            self.metrics.queue_seconds.labels(*self.labels).observe(wait)

    def queue(self, images: int) -> None:
        """Record the queue's length."""
        self.metrics.queue_images.labels(*self.labels).set(images)

    def rejected(self, reason: str) -> None:
        """Record work that was refused or dropped."""
        self.failures += 1
        self.metrics.rejected.labels(*self.labels, reason).inc()

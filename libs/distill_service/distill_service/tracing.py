"""OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT is set; elsewhere nothing of it is even imported.

A call, its wait in a queue and the batch that answered it share one trace; the batch also links to the calls of all
its other images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from distill_core.errors import ConfigError, install_command
from distill_service.addresses import grpc_options
from distill_service.settings import Settings, settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext

_UNTRACED = "/grpc.health.v1.Health/"  # probes would drown the calls
_active: Tracing | None = None


class Tracing:
    """The spans of one process, sent through `provider`."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.instrumentation import grpc as instrumented

        self.provider = provider
        self._trace, self._instrumented = trace, instrumented
        self._tracer = provider.get_tracer("distillery")

    def server_interceptor(self) -> Any:
        """A `grpc.aio.ServerInterceptor`: a span around each call, child of the client's."""
        return self._instrumented.aio_server_interceptor(self.provider, filter_=_is_traced)  # type: ignore[no-untyped-call]

    def client_interceptors(self) -> list[Any]:
        """Interceptors of a `grpc.aio` channel, so that its calls carry a span to the server."""
        return list(self._instrumented.aio_client_interceptors(self.provider))  # type: ignore[no-untyped-call]

    def intercepted(self, channel: Any) -> Any:
        """The same for a `grpc.Channel`."""
        return grpc.intercept_channel(channel, _ClientSpans(self._tracer))

    def origin(self) -> SpanContext | None:
        """The span that now runs; None if there is none, or nobody records it."""
        context = self._trace.get_current_span().get_span_context()
        return context if context.is_valid and context.trace_flags.sampled else None

    def trace_id(self) -> str | None:
        """The trace that now runs, as 32 hexadecimal digits."""
        context = self._trace.get_current_span().get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid else None

    def batch(
        self,
        origins: Sequence[SpanContext | None],
        waits: Sequence[float],
        seconds: float,
        attributes: Mapping[str, str | int],
    ) -> None:
        """Spans of a batch that ended just now: one wait for each of its calls, and the batch itself.

        `waits` (s) belong to `origins`, one an image.
        """
        calls = {origin.span_id: origin for origin in origins if origin is not None}
        if not calls:
            return
        longest = dict.fromkeys(calls, 0.0)
        for origin, wait in zip(origins, waits, strict=True):
            if origin is not None:
                longest[origin.span_id] = max(wait, longest[origin.span_id])
        end = time.time_ns()
        start = end - int(seconds * 1e9)
        for number, wait in longest.items():
            self._span("batch.wait", calls[number], start - int(wait * 1e9), start)
        first, *others = calls.values()
        self._span("batch", first, start, end, attributes, links=(first, *others))

    def _span(
        self,
        name: str,
        parent: SpanContext,
        start: int,
        end: int,
        attributes: Mapping[str, str | int] | None = None,
        *,
        links: Sequence[SpanContext] = (),
    ) -> None:
        trace = self._trace
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        linked = [trace.Link(other) for other in links]
        span = self._tracer.start_span(name, context, attributes=attributes, links=linked, start_time=start)
        span.end(end)


class _ClientSpans(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """A span around each call. OpenTelemetry's own interceptor makes streams that cannot be cancelled."""

    def __init__(self, tracer: Any) -> None:
        from opentelemetry import propagate, trace

        self._tracer, self._trace, self._inject = tracer, trace, propagate.inject

    def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        kind = self._trace.SpanKind.CLIENT
        with self._tracer.start_as_current_span(details.method, kind=kind, end_on_exit=False) as span:
            carrier: dict[str, str] = {}
            self._inject(carrier)
            metadata = [*(details.metadata or ()), *carrier.items()]
            call = continuation(details._replace(metadata=metadata), request)
        call.add_done_callback(lambda done: self._end(span, done.code()))
        return call

    def _end(self, span: Any, code: grpc.StatusCode) -> None:
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    intercept_unary_unary = intercept_unary_stream = _call
    intercept_stream_unary = intercept_stream_stream = _call


def tracing() -> Tracing | None:
    """This process's tracing; None: off."""
    return _active


def start_tracing(service: str, given: Settings | None = None) -> Tracing | None:
    """Send this process's spans to `otlp_endpoint`, if one is set; once, the first caller names the service.

    Raises:
        ConfigError: it is set, and the extra that speaks to it is not installed.
    """
    global _active
    endpoint = (given or settings()).otlp_endpoint
    if _active is None and endpoint:
        try:
            _active = Tracing(_provider(service, endpoint))
        except ImportError as error:
            raise ConfigError(
                f"OTEL_EXPORTER_OTLP_ENDPOINT is set, and {error.name} is not installed; "
                f"run: {install_command('otel')}, or unset it",
                field="otlp_endpoint",
            ) from None
    return _active


def _provider(service: str, endpoint: str) -> TracerProvider:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    existing = trace.get_tracer_provider()
    if isinstance(existing, TracerProvider):  # the program that uses our client has its own
        return existing
    provider = TracerProvider(resource=Resource.create({"service.name": f"distillery-{service}"}))
    options: Any = tuple(grpc_options(endpoint))  # the exporter's own type for them leaves numbers out
    exporter = OTLPSpanExporter(endpoint=endpoint, channel_options=options)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _is_traced(call: Any) -> bool:
    return not call.method.startswith(_UNTRACED)

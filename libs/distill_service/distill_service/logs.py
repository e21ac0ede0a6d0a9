"""One log format for all services: JSON lines on stderr, or coloured text on a terminal."""

from __future__ import annotations

import logging
import sys

import structlog

from distill_service.settings import Settings
from distill_service.tracing import tracing

_QUIET = (
    "alembic",
    "amqp",
    "asyncio",
    "celery.app.trace",
    "celery.bootsteps",
    "celery.worker.strategy",
    "fsspec",
    "httpx",
    "kombu",
    "urllib3",
)


def configure_logging(service: str, settings: Settings) -> None:
    """Route structlog and the standard library (celery, grpc, sqlalchemy) through one formatter on stderr.

    Context variables bound with `structlog.contextvars.bind_contextvars(job_id=…)` appear in every line, and where
    tracing is on the `trace_id`. Warnings of Python are lines too.
    """
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_service(service),
        _add_trace_id,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(settings)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _renderers(settings: Settings) -> list[structlog.types.Processor]:
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    if console:
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _add_trace_id(
    _logger: object, _method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    traced = tracing()
    if traced is not None and (found := traced.trace_id()):
        event["trace_id"] = found
    return event


def _name_service(service: str) -> structlog.types.Processor:
    def add(_logger: object, _method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        event["service"] = service
        return event

    return add

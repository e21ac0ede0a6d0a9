"""The Jobs API process: `python -m distillery_trainer.server`."""

from __future__ import annotations

import asyncio
import sys

from prometheus_client import CollectorRegistry, Counter, Histogram

from distill_core.errors import DistilleryError, codes_of
from distill_service.jobs.broker import running_broker
from distill_service.jobs.celery_app import make_app
from distill_service.jobs.database import Database
from distill_service.jobs.metrics import JobTableCollector
from distill_service.logs import configure_logging
from distill_service.metrics import SECONDS, serve_metrics
from distill_service.rpc import RpcSettings, add_health_and_reflection, build_server, run_until_stopped
from distill_service.settings import Settings, of_a_folder, settings
from distill_service.tracing import start_tracing
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery_trainer.servicer import JobsServicer

SERVICE = jobs_pb2.DESCRIPTOR.services_by_name["JobsService"].full_name
_CHANGING = ("Submit", "Cancel", "Retry", "PauseQueue", "ResumeQueue", "CollectGarbage")
ADMIN_METHODS = frozenset(f"/{SERVICE}/{name}" for name in _CHANGING)  # the others only read
MAX_CALLS = 16_384  # at once; most of them are watchers, which cost next to nothing


def rpc_settings(values: Settings) -> RpcSettings:
    """Address of the Jobs API."""
    return RpcSettings.parse(
        {
            "host": values.jobs_host,
            "port": values.jobs_port,
            "tls_cert": values.tls_cert,
            "tls_key": values.tls_key,
            "tls_client_ca": values.tls_client_ca,
            "tokens_file": values.tokens_file,
            "audit_log": values.audit_log,
            "max_concurrent": MAX_CALLS,
        }
    )


class CallMetrics:
    """Counts and durations of calls."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._count = Counter("distillery_jobs_requests", "Calls", ["method", "code"], registry=registry)
        self._seconds = Histogram(
            "distillery_jobs_request_seconds", "Durations", ["method"], buckets=SECONDS, registry=registry
        )

    def __call__(self, method: str, code: str, seconds: float) -> None:
        name = method.rsplit("/", 1)[-1]
        self._count.labels(name, code).inc()
        self._seconds.labels(name).observe(seconds)


async def serve(values: Settings, broker: str) -> None:
    """Serve the Jobs API until SIGTERM."""
    db = await asyncio.to_thread(Database.open, values.database_url)
    registry = CollectorRegistry()
    registry.register(JobTableCollector(db))
    listen = rpc_settings(values)
    server = build_server(listen, admin_methods=ADMIN_METHODS, on_call=CallMetrics(registry))
    jobs_pb2_grpc.add_JobsServiceServicer_to_server(JobsServicer(db, make_app(broker), values), server)
    health = add_health_and_reflection(server, [SERVICE])
    serve_metrics(registry, values, "jobs_metrics_port")
    try:
        await run_until_stopped(server, listen, health)
    finally:
        db.close()


def main() -> int:
    """Run the Jobs API, and the embedded broker if none is configured; returns the exit code."""
    try:
        values = settings()
        configure_logging("jobs", values)
        start_tracing("jobs", values)
        with running_broker(values) as broker:
            asyncio.run(serve(values, broker))
    except (DistilleryError, OSError) as error:
        failure = of_a_folder(error)
        print(f"error: {failure}", file=sys.stderr)
        return codes_of(failure).exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

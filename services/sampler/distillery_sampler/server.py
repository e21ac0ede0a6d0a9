"""The sampler process: `python -m distillery_sampler.server`."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

import grpc
import structlog
from tritonclient.grpc import service_pb2_grpc

from distill_core.artifacts import ArtifactStore
from distill_core.errors import DistilleryError, codes_of
from distill_core.library_bars import hide_library_bars
from distill_service.logs import configure_logging
from distill_service.metrics import serve_metrics
from distill_service.rpc import (
    Health,
    RpcSettings,
    Shed,
    add_health_and_reflection,
    build_server,
    run_until_stopped,
)
from distill_service.settings import Settings, of_a_folder, settings
from distill_service.tracing import start_tracing
from distillery.v1 import models_pb2_grpc, sampler_pb2_grpc
from distillery_sampler.engine.engine import Engine
from distillery_sampler.kserve import servicer as kserve
from distillery_sampler.metrics import Metrics
from distillery_sampler.models.memory import freeze_garbage_collector, limit_malloc_arenas
from distillery_sampler.models.watcher import watch_store
from distillery_sampler.settings import SamplerSettings, load_sampler_settings
from distillery_sampler.v1 import servicer

SERVICES = ("distillery.v1.SamplerService", "distillery.v1.ModelsService", kserve.SERVICE)
FOR_PICTURES = servicer.FOR_PICTURES | kserve.FOR_PICTURES
SWITCH_S = (
    0.0001  # a model thread that is ready waits no longer for the event loop to let go of the interpreter
)
_log = structlog.get_logger("distillery.sampler")


async def serve(shared: Settings, own: SamplerSettings) -> None:
    """Serve until SIGTERM; SERVING is reported when the preloaded models are warm.

    Raises:
        DistilleryError: the port is in use, a setting is wrong, a preloaded model cannot be loaded.
    """
    metrics = Metrics()
    serve_metrics(metrics.registry, shared, "sampler_metrics_port")
    engine = Engine(ArtifactStore(shared.store_url), shared.cache_dir / "models", own, metrics)
    rpc = rpc_settings(shared, own)
    admin = servicer.ADMIN_METHODS | kserve.ADMIN_METHODS
    shed = Shed(FOR_PICTURES, engine.models.too_late)
    server = build_server(rpc, admin_methods=admin, on_call=metrics.on_call, shed=shed)
    health = add_health_and_reflection(server, SERVICES)
    add_services(server, engine, health)
    watcher = asyncio.create_task(watch_store(engine.models, own.poll_s))

    async def warm(_port: int) -> None:
        await preload(engine, own, health)

    try:
        await run_until_stopped(server, rpc, health, grace_s=own.grace_s, on_started=warm, ready=False)
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        await engine.close()


def rpc_settings(shared: Settings, own: SamplerSettings) -> RpcSettings:
    """Address of this process."""
    return RpcSettings.parse(
        {
            "host": shared.sampler_host,
            "port": shared.sampler_port,
            "tls_cert": shared.tls_cert,
            "tls_key": shared.tls_key,
            "tls_client_ca": shared.tls_client_ca,
            "tokens_file": shared.tokens_file,
            "audit_log": shared.audit_log,
            "max_concurrent": own.max_concurrent,
        }
    )


def add_services(server: grpc.aio.Server, engine: Engine, health: Health) -> None:
    """Our two services and KServe's, over one engine."""
    sampler_pb2_grpc.add_SamplerServiceServicer_to_server(servicer.SamplerServicer(engine), server)
    models_pb2_grpc.add_ModelsServiceServicer_to_server(servicer.ModelsServicer(engine), server)
    kserve_servicer = kserve.KserveServicer(engine, lambda: health.serving)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve_servicer, server)


async def preload(engine: Engine, own: SamplerSettings, health: Health) -> None:
    """Load what the settings name, then report SERVING."""
    for ref in own.preload:
        await engine.models.load(ref)
    names = sorted({info.manifest.name for info in await engine.models.infos()})
    freeze_garbage_collector()
    _log.info("ready", models=names, loaded=[model.manifest.ref for model in engine.models.loaded()])
    await health.report(True)


def main() -> int:
    """Run the process; the exit code says what kind of error ended it."""
    try:
        shared, own = settings(), load_sampler_settings()
        configure_logging("sampler", shared)
        hide_library_bars()
        limit_malloc_arenas()
        start_tracing("sampler", shared)
        sys.setswitchinterval(SWITCH_S)
        asyncio.run(serve(shared, own))
    except (DistilleryError, OSError) as error:
        failure = of_a_folder(error)
        print(f"sampler: {failure}", file=sys.stderr)
        return codes_of(failure).exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

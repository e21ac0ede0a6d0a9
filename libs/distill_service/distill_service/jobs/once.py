"""A worker for one job: it claims one, runs it and ends. A batch system (a Kubernetes Job) starts such processes."""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Mapping, Sequence

import structlog

from distill_service.jobs import queue
from distill_service.jobs.broker import broker_url
from distill_service.jobs.celery_app import make_app, wake
from distill_service.jobs.database import Database
from distill_service.jobs.supervisor import COMMANDS, Supervisor
from distill_service.logs import configure_logging
from distill_service.settings import Settings

_log = structlog.get_logger("distillery.worker")


def run_once(
    queues: Sequence[str],
    settings: Settings,
    *,
    commands: Mapping[str, str] = COMMANDS,
    service: str = "worker",
) -> int:
    """Run the most urgent job of `queues`, if there is one. 0 however the job ended: its row says how.

    On SIGTERM the job writes a checkpoint and returns to its queue.
    """
    configure_logging(service, settings)
    db = Database.open(settings.database_url)
    name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
    supervisor = Supervisor(db, settings, worker=name, commands=commands)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
    try:
        queue.reap(db, who=name)  # where all workers are such processes, nobody else does
        claim = queue.claim(db, queues, worker=name, lease_s=settings.lease_s)
        if claim is None:
            _log.info("no job waits", queues=list(queues))
            return 0
        outcome = supervisor.run(claim)
        if outcome is not None and outcome.verdict == "succeeded":
            wake(make_app(broker_url(settings)), queue.child_queues(db, claim.id))
        return 0
    finally:
        db.close()

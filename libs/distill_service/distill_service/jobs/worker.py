"""A worker process: Celery listens for wake-ups, one thread runs a job at a time, another keeps watch.

The watch looks every `reap_s` for expired leases (one worker does so for all) and, if this worker is idle,
for jobs of its queues. So a lost message, or a broker that is down, delays a job by `reap_s` and no more.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from celery import Celery, signals
from celery.exceptions import SecurityWarning

from distill_core.errors import Unavailable
from distill_service.jobs import queue
from distill_service.jobs.broker import broker_url
from distill_service.jobs.celery_app import RUN_NEXT, make_app, wake
from distill_service.jobs.database import Database
from distill_service.jobs.metrics import WorkerMetrics
from distill_service.jobs.supervisor import COMMANDS, Supervisor
from distill_service.jobs.table import Kind, queue_of
from distill_service.logs import configure_logging
from distill_service.metrics import serve_metrics
from distill_service.settings import Settings

_LISTEN_AGAIN_S = 1.0
_log = structlog.get_logger("distillery.worker")


class Worker:
    """Claims and runs the jobs of some queues until stopped."""

    def __init__(
        self,
        db: Database,
        app: Celery,
        settings: Settings,
        queues: Sequence[str],
        *,
        commands: Mapping[str, str] = COMMANDS,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
        self.metrics = metrics or WorkerMetrics()
        self._db, self._app, self._settings, self._queues = db, app, settings, tuple(queues)
        self._supervisor = Supervisor(
            db, settings, worker=self.name, commands=commands, observe=self.metrics.observe
        )
        self._busy = threading.Lock()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        app.task(self.run_all, name=RUN_NEXT, ignore_result=True)

    def run_all(self, _queue: str = "") -> None:
        """Run jobs, the most urgent of all our queues first, until none is left."""
        with self._busy:
            try:
                while not self._supervisor.stopping and (claim := self._claim()):
                    self._run(claim)
            except Unavailable as error:
                _log.warning("cannot look for jobs", error=str(error))

    def _claim(self) -> queue.Claim | None:
        return queue.claim(self._db, self._queues, worker=self.name, lease_s=self._settings.lease_s)

    def _run(self, claim: queue.Claim) -> None:
        with self.metrics.running(claim):
            outcome = self._supervisor.run(claim)
        if outcome is not None and outcome.verdict == "succeeded":
            wake(self._app, queue.child_queues(self._db, claim.id))
        elif outcome is not None and outcome.verdict in ("crashed", "preempted"):
            wake(self._app, [queue_of(Kind(claim.kind), claim.spec)])  # another worker may be idle

    def watch(self) -> None:
        """Reap and look for work until stopped."""
        pause = 0.0  # jobs that wait already are found at once
        while not self._stopped.wait(pause):
            try:
                self.tick()
            except Unavailable as error:
                _log.warning("watch skipped", error=str(error))
            except Exception:
                _log.exception("watch failed")  # and goes on: without it no lease is ever reaped
            pause = self._settings.reap_s

    def tick(self) -> None:
        """One round of the watch."""
        if queue.lead(self._db, "reaper", holder=self.name, for_s=self._settings.reap_s * 0.9):
            longest = 10 * self._settings.lease_s  # workers may differ, but not by that much
            for job_id in queue.reap(self._db, who=self.name, longest_lease_s=longest):
                _log.warning("lease expired", job_id=job_id)
        if not self._busy.locked() and queue.waiting(self._db, self._queues):
            thread = threading.Thread(target=self.run_all, name="job")
            self._threads = [running for running in self._threads if running.is_alive()] + [thread]
            thread.start()

    def start(self) -> None:
        """Begin the watch."""
        threading.Thread(target=self.watch, name="watch", daemon=True).start()

    @property
    def stopping(self) -> bool:
        return self._stopped.is_set()

    def stop(self, **_: Any) -> None:
        """Give the running job back and claim no more."""
        self._stopped.set()
        self._supervisor.stop()

    def join(self) -> None:
        """Wait until the running job has been given back."""
        for thread in self._threads:
            thread.join()
        with self._busy:
            pass


def run_worker(
    queues: Sequence[str],
    settings: Settings,
    *,
    commands: Mapping[str, str] = COMMANDS,
    service: str = "worker",
    metrics_port: str = "worker_metrics_port",
) -> int:
    """Run a worker for `queues` in this process until SIGTERM; returns its exit code.

    `metrics_port` is the name of the setting that holds it.
    """
    configure_logging(service, settings)
    db = Database.open(settings.database_url)
    app = make_app(broker_url(settings))
    worker = Worker(db, app, settings, queues, commands=commands)
    serve_metrics(worker.metrics.registry, settings, metrics_port)
    signals.worker_shutting_down.connect(worker.stop, weak=False)
    warnings.simplefilter("ignore", SecurityWarning)  # it warns root of pickled messages; ours are JSON
    worker.start()
    _log.info("worker ready", worker=worker.name, queues=list(queues))
    code = 0
    while not worker.stopping:
        code = _listen(app, f"{service}@{worker.name}", queues, settings)
        if not worker.stopping:  # Celery gives up at a message that it cannot read; jobs need no message
            _log.warning("stopped listening for wake-ups and begin again", code=code)
            time.sleep(_LISTEN_AGAIN_S)
    worker.stop()
    worker.join()
    db.close()
    return code


def _listen(app: Celery, name: str, queues: Sequence[str], settings: Settings) -> int:
    """Hear wake-ups until told to stop, or until Celery gives up; its exit code."""
    # Threads, not processes: a job is a process of its own already, and one process sees every signal.
    bell = app.Worker(
        hostname=name,
        queues=list(queues),
        pool="threads",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
        loglevel=settings.log_level,
    )
    bell.start()
    return int(bell.exitcode or 0)

"""A whole installation under chaos: broker, database, Jobs API and workers, each restarted when it dies."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select, text

from distill_core.errors import DistilleryError
from distill_service.jobs.broker import redis_server, socket_path
from distill_service.jobs.database import Database
from distill_service.jobs.table import ENDED, Job
from distill_service.settings import Settings
from tests.chaos import servers
from tests.chaos.witness import FOLDER, WORLD, Witness, processes_of
from tests.helpers import REPOSITORY
from tests.services.jobs.jobs_stack import short_settings

BROKERS = ("embedded", "redis", "filesystem")
DISK_BYTES = 96 * 2**20
SHORT: dict[str, Any] = {"lease_s": 4.0, "heartbeat_s": 0.7, "reap_s": 1.0, "stop_grace_s": 10.0}
WORKERS = {"worker-a": ("train", "eval"), "worker-b": ("train", "eval"), "converter": ("convert",)}
_MAX_ATTEMPTS = 100


@dataclass
class Service:
    """One process that is started again whenever it ends."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = -1


class World:
    """Started by `world(...)`. Its state lies on a small disk of its own where this user may mount one."""

    def __init__(
        self, folder: Path, broker: str, *, own_disk: bool, postgres: servers.Postgres | None = None
    ) -> None:
        self.folder, self.broker, self.own_disk, self.postgres = folder, broker, own_disk, postgres
        self.id = secrets.token_hex(8)
        self.witness = Witness(folder / "witness")
        self.state = folder / "disk" / "state"
        self.state.mkdir(parents=True)
        urls = {"redis": f"redis://127.0.0.1:{servers.free_port()}/0"}
        urls["filesystem"] = f"filesystem://{self.state / 'broker'}"
        self.settings: Settings = short_settings(
            self.state,
            **SHORT,
            broker_url=urls.get(broker, ""),
            database_url=postgres.url if postgres else "",
            cache_dir=folder / "cache",
            max_attempts=_MAX_ATTEMPTS,
        )
        self.services = {service.name: service for service in self._commands()}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self.db: Database | None = None

    def _commands(self) -> Iterator[Service]:
        python = sys.executable
        if self.broker == "redis":
            yield Service("redis", servers.redis_command(self.settings.broker_url, self.folder))
        yield Service("api", [python, "-m", "distillery_trainer.server"])
        for name, queues in WORKERS.items():
            yield Service(name, [python, "-m", "tests.chaos.worker", *queues])

    def set_clock(self, seconds: float) -> None:
        """Do to the job table what setting the machine's clock by so much does: all its times move against now."""
        assert self.db is not None
        moves = {"jobs": ("lease_until", "not_before"), "job_leaders": ("until",)}
        with self.db.write() as session:
            for table, columns in moves.items():
                for column in columns:
                    session.execute(text(f"UPDATE {table} SET {column} = {column} - :by"), {"by": seconds})

    def start(self) -> None:
        """Start everything, and keep it running."""
        self._tend()
        self._keeper.start()
        self.db = Database.open(self.settings.database_url)

    def _environment(self) -> dict[str, str]:
        values = self.settings.model_dump(mode="json", exclude_none=True)
        made = {f"DISTILLERY_{key.upper()}": str(value) for key, value in values.items()}
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        made |= {"PYTHONPATH": path, FOLDER: str(self.witness.folder), WORLD: self.id, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **made}

    def _keep(self) -> None:
        while not self._stopping.wait(0.3):
            self._tend()

    def _tend(self) -> None:
        with self._lock:
            for service in self.services.values():
                if self._stopping.is_set() or (service.process and service.process.poll() is None):
                    continue
                with (self.folder / f"{service.name}.log").open("ab") as log:
                    service.process = subprocess.Popen(
                        service.command,
                        env=self._environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                service.restarts += 1

    def pid(self, name: str) -> int:
        """The process id of a service now; the embedded Redis is a child of the Jobs API."""
        if name == "redis" and name not in self.services:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    if "redis-server" in process.name():
                        return process.pid
            raise LookupError("the embedded Redis does not run now")
        process = self.services[name].process
        assert process is not None
        return process.pid

    def processes(self) -> list[psutil.Process]:
        """Every live process of this installation."""
        embedded = self.broker == "embedded"
        return processes_of(self.id, str(socket_path(self.settings.state_dir)) if embedded else "")

    def unfinished(self) -> int:
        """Jobs that have not ended, 1000 while the table cannot be asked."""
        assert self.db is not None
        try:
            with self.db.read() as session:
                query = (
                    select(func.count())
                    .select_from(Job)
                    .where(Job.state.not_in(ENDED), Job.pipeline.is_(None))
                )
                return int(session.scalar(query) or 0)
        except DistilleryError:
            return 1000

    def stop(self) -> list[psutil.Process]:
        """End every service as an operator does; the processes that are left, which nobody should have left."""
        self._stopping.set()
        with self._lock:
            running = [
                service.process for service in reversed(list(self.services.values())) if service.process
            ]
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
        deadline = time.monotonic() + 3
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def destroy(self) -> None:
        """Kill what is left."""
        self._stopping.set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.db is not None:
            self.db.close()


@contextlib.contextmanager
def world(
    folder: Path, broker: str, *, store: Path, postgres: servers.Postgres | None = None
) -> Iterator[World]:
    """A running installation in `folder`, its store begun as a copy of `store`."""
    assert broker in BROKERS
    disk = folder / "disk"
    disk.mkdir(parents=True)
    own_disk = servers.mounted(disk, DISK_BYTES)
    made = World(folder, broker, own_disk=own_disk, postgres=postgres)
    shutil.copytree(store, made.settings.store_url)
    try:
        made.start()
        yield made
    finally:
        made.destroy()
        if own_disk:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def missing(broker: str) -> str:
    """Why this broker cannot be tried here; empty if it can."""
    if broker != "filesystem" and redis_server() is None:
        return f"broker {broker}: no redis-server program here"
    return ""

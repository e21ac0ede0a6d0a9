"""Real processes and tables for the job tests, at short leases."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from distill_service.jobs import requests, specs
from distill_service.jobs.broker import socket_path
from distill_service.jobs.database import Database
from distill_service.jobs.requests import Options, Record
from distill_service.jobs.specs import Draft
from distill_service.jobs.table import ENDED
from distill_service.settings import Settings, load_settings

HERE = Path(__file__).parent
COMMANDS = dict.fromkeys(("train", "evaluate", "convert"), "jobs_child")
WAIT_S = 240.0  # no deadline that a machine with other work would miss


def wait_for(condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.03)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def short_settings(folder: Path, **values: Any) -> Settings:
    short = {
        "state_dir": folder,
        "lease_s": 1.5,
        "heartbeat_s": 0.3,
        "reap_s": 0.3,
        "stop_grace_s": 3.0,
        "jobs_port": free_port(),
        "jobs_metrics_port": free_port(),
        "worker_metrics_port": 0,
    }
    return load_settings(**(short | values))


def recipe(**values: Any) -> dict[str, Any]:
    return {"method": "dmd2", "steps": 3, **values}


def train(
    stage: str = "", after: tuple[str, ...] = (), publish: str | None = "digits", **values: Any
) -> Draft:
    tables = {"publish": {"name": publish}} if publish else {}
    draft = specs.draft_train(toml=tomli_w.dumps(recipe(**values, **tables)))
    return Draft(draft.kind, draft.spec, draft.name, stage, after, publishes=draft.publishes)


def convert(artifact: str, stage: str = "") -> Draft:
    draft = specs.draft_convert({"artifact": artifact, "target": "onnx-fp32"})
    return Draft(draft.kind, draft.spec, draft.name, stage)


def submit(db: Database, *drafts: Draft, pipeline: bool = False, **options: Any) -> Record:
    return requests.submit(db, drafts, Options(**options), pipeline=pipeline)


def ended(db: Database, job_id: str) -> requests.Job:
    def look() -> requests.Job | None:
        job = requests.get(db, job_id).job
        return job if job.state in ENDED else None

    return wait_for(look, f"job {job_id} to end")


def history(db: Database, job_id: str) -> list[str]:
    return [event.what for event in requests.events(db, job_id)]


class Processes:
    """Services started by a test; whatever still runs is killed at its end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        changed = self.settings.model_dump(mode="json", exclude_none=True)
        variables = {f"DISTILLERY_{key.upper()}": str(value) for key, value in changed.items()}
        modules = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **variables, "PYTHONPATH": modules}
        with (self.settings.state_dir / "services.log").open("ab") as log:
            command = [sys.executable, *arguments]
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        return process

    def worker(self, *queues: str) -> subprocess.Popen[bytes]:
        return self.start(str(HERE / "jobs_worker.py"), *(queues or ("train", "convert", "eval")))

    def server(self) -> subprocess.Popen[bytes]:
        return self.start("-m", "distillery_trainer.server")

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()

    def log(self) -> str:
        return (self.settings.state_dir / "services.log").read_text()


@contextmanager
def processes(settings: Settings) -> Iterator[Processes]:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    running = Processes(settings)
    try:
        yield running
    finally:
        running.end()


def child_pids(settings: Settings, job_id: str) -> list[int]:
    """The processes of a job's attempts, oldest first."""
    try:
        lines = (settings.runs / job_id / "attempts").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [int(line.split()[1]) for line in lines]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def step_of(settings: Settings, job_id: str) -> int:
    try:
        return int((settings.runs / job_id / "checkpoint").read_text())
    except FileNotFoundError:
        return 0


def redis_pid(settings: Settings) -> int:
    wanted = str(socket_path(settings.state_dir))
    return next(
        p.pid for p in psutil.process_iter(["cmdline"]) if wanted in " ".join(p.info["cmdline"] or [])
    )

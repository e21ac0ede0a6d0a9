"""What really ran, seen from outside of the product: each job process signs a log and holds a lock of its job.

The kernel releases the lock when the process is gone, however it went. Who finds it taken has seen a job run twice.
"""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

FOLDER = "CHAOS_WITNESS"  # the variable that tells job processes where to sign
WORLD = "CHAOS_WORLD"  # every process of a world has it, and its descendants inherit it


class Line(NamedTuple):
    """A job process said something: `start`, `end` or `twice`."""

    what: str
    job: str
    kind: str
    attempt: int
    pid: int


class Signature:
    """A job process's own side: `with Signature(task): run()`."""

    def __init__(self, task: dict) -> None:
        self._folder = Path(os.environ[FOLDER])
        self._said = f"{task['job']} {task['kind']} {task['attempt']} {os.getpid()}"
        self._lock = (self._folder / f"{task['job']}.lock").open("a")

    def __enter__(self) -> Signature:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say("twice")
        self._say("start")
        return self

    def __exit__(self, *_: object) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # what limit_files did is for the job alone
        self._say("end")

    def _say(self, what: str) -> None:
        line = os.open(self._folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(line, f"{what} {self._said} {time.monotonic():.3f}\n".encode())  # one write: never torn
        os.close(line)


class Witness:
    """Reads what the job processes of a world signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def lines(self) -> list[Line]:
        """All that was signed, oldest first."""
        try:
            text = (self.folder / "log").read_text()
        except FileNotFoundError:
            return []
        parts = (line.split() for line in text.splitlines())
        return [
            Line(what, job, kind, int(attempt), int(pid)) for what, job, kind, attempt, pid, _time in parts
        ]

    def running(self, *kinds: str) -> list[Line]:
        """Job processes of these kinds that are alive now."""
        lines = self.lines()
        ended = {(line.job, line.attempt) for line in lines if line.what == "end"}
        started = [line for line in lines if line.what == "start" and (line.job, line.attempt) not in ended]
        return [line for line in started if line.kind in kinds and alive(line.pid)]

    def twice(self) -> int:
        """How often a job's process found another one of the same job."""
        return sum(line.what == "twice" for line in self.lines())

    def attempts(self) -> Counter[str]:
        """How many processes each job had."""
        return Counter(line.job for line in self.lines() if line.what == "start")


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(world: str, socket: str = "") -> list[psutil.Process]:
    """Every live process that was started by this world, wherever in the tree it is now.

    A Redis overwrites its environment with its title; the one on `socket` is known by that.
    """
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(WORLD) == world
            ours = ours or bool(socket) and any(f":{socket}" in part for part in process.cmdline())
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]

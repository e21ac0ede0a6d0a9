"""What a chaos world needs of the machine: PostgreSQL, Redis and a small disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from distill_service.jobs.broker import redis_server
from tests.services.jobs.jobs_stack import free_port, wait_for

__all__ = ["Postgres", "free_port", "mounted", "postgres", "redis_command"]


def redis_command(url: str, folder: Path) -> list[str]:
    """A Redis server that keeps its data in a file, unless that is taken away."""
    program = redis_server()
    assert program is not None
    data = folder / "redis"
    data.mkdir()
    options = {"port": str(urlsplit(url).port), "dir": str(data), "save": "", "appendonly": "yes"}
    options["set-proc-title"] = "no"  # which would overwrite the variable that tells whose process it is
    return [program, *(part for key, value in options.items() for part in (f"--{key}", value))]


def mounted(folder: Path, size: int) -> bool:
    """Make `folder` a file system of `size` bytes; False where this user may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


class Postgres:
    """A PostgreSQL server of our own, in a temporary folder, on a unix socket."""

    def __init__(self, initdb: Path, folder: Path) -> None:
        self.folder = folder
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        if user:
            shutil.chown(folder, user)
        self._run = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options = ["-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "-N"]
        subprocess.run([str(initdb), *options], check=True, **self._run)  # type: ignore[call-overload]
        self._program = str(initdb.resolve().with_name("postgres"))
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["-k", str(self.folder), "-c", "listen_addresses=", "-c", "max_connections=60"]
        self.process = subprocess.Popen([self._program, "-D", f"{self.folder}/data", *options], **self._run)  # type: ignore[call-overload]
        wait_for(self._answers, "PostgreSQL to start", 60)

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url):
            return True
        return False

    def crash(self) -> None:
        """End it without a checkpoint, as a power cut does; its files stay."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()


@contextlib.contextmanager
def postgres() -> Iterator[Postgres | None]:
    """A server for the block; None where PostgreSQL is not installed."""
    found = [Path(path) for path in (shutil.which("initdb"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Postgres(found[0], folder)
    try:
        yield server
    finally:
        server.crash()
        shutil.rmtree(folder, ignore_errors=True)

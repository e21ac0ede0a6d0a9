"""A PostgreSQL server of one's own, in a temporary folder and on a socket in it, for measurements and tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distill_core.errors import Unavailable

START_S = 30.0
_FAST = ("-c", "fsync=off", "-c", "max_connections=50")  # nobody needs its files after a crash of the machine


def initdb() -> str | None:
    """The program that makes a PostgreSQL server's folder, if it is installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return shutil.which("initdb") or next(map(str, reversed(debian)), None)


@contextmanager
def temporary_postgres() -> Iterator[str]:
    """The URL of a server that lives as long as the block.

    Raises:
        Unavailable: PostgreSQL is not installed, or does not start.
    """
    program = initdb()
    if program is None:
        raise Unavailable("PostgreSQL is not installed; apt-get install postgresql")
    folder = tempfile.mkdtemp(prefix="pg-")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    if user:
        shutil.chown(folder, user)
    quiet: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
    make = [program, "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "-N"]
    serve = [str(Path(program).resolve().with_name("postgres")), "-D", f"{folder}/data", "-k", folder]
    try:
        subprocess.run(make, check=True, **quiet)
        server = subprocess.Popen(
            [*serve, "-c", "listen_addresses=", *_FAST], stderr=subprocess.DEVNULL, **quiet
        )
        try:
            url = f"postgresql://postgres@/postgres?host={quote(folder)}"
            _wait(url)
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)  # at once
            server.wait()
    except (OSError, subprocess.CalledProcessError, LookupError) as error:
        raise Unavailable(f"PostgreSQL does not start: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str) -> None:
    import psycopg

    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                reason = " ".join(str(error).split())
                raise Unavailable(f"PostgreSQL did not start within {START_S:.0f} s: {reason}") from None
        time.sleep(0.05)

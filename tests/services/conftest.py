from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from distill_service.jobs.database import Database
from tests.services.jobs_stack import wait_for


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that lives as long as the tests; skipped where it is not installed."""
    initdb = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tempfile.mkdtemp(prefix="pg-")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    if user:
        shutil.chown(folder, user)
    quiet: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
    try:
        subprocess.run(
            [initdb, "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "-N"], check=True, **quiet
        )
        program = str(Path(initdb).resolve().with_name("postgres"))
        options = ["-k", folder, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50"]
        server = subprocess.Popen(
            [program, "-D", f"{folder}/data", *options], stderr=subprocess.DEVNULL, **quiet
        )
        yield f"postgresql://postgres@/postgres?host={folder}"
        server.send_signal(signal.SIGQUIT)  # at once: nobody needs its files
        server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def table_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh job table's URL, on each database that is supported."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    url = request.getfixturevalue("postgres")
    name = f"jobs_{secrets.token_hex(4)}"
    wait_for(lambda: _created(url, name), "PostgreSQL to start")
    return f"{url}&options=-csearch_path%3D{name}"


def _created(url: str, name: str) -> bool:
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture
def table(table_url: str) -> Iterator[Database]:
    database = Database.open(table_url)
    yield database
    database.close()

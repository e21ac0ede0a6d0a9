from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from distill_service.jobs.database import Database
from tools.temporary_postgres import initdb, temporary_postgres


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that lives as long as the tests; skipped where it is not installed."""
    if initdb() is None:
        pytest.skip("PostgreSQL is not installed; apt-get install postgresql")
    with temporary_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def table_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh job table's URL, on each database that is supported."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    return request.getfixturevalue("postgres_schema")


@pytest.fixture
def postgres_schema(postgres: str) -> str:
    """The URL of an empty schema of its own on PostgreSQL."""
    name = f"jobs_{secrets.token_hex(4)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{postgres}&options=-csearch_path%3D{name}"


@pytest.fixture
def table(table_url: str) -> Iterator[Database]:
    database = Database.open(table_url)
    yield database
    database.close()

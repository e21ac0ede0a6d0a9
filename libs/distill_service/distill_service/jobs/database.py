"""Connections to the job table: SQLite in WAL mode or PostgreSQL, one transaction per operation."""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import Double

from distill_core.errors import ConfigError, Unavailable

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 7_263_401  # any number, the same in all our processes
_UNDEFINED_TABLE = "42P01"  # PostgreSQL's
_log = structlog.get_logger("distillery.jobs")


class epoch(GenericFunction[float]):  # noqa: N801 (named like the SQL function it is)
    """Seconds since 1970 by the database's clock, so that hosts with wrong clocks cannot break leases."""

    type = Double()
    inherit_cache = True


@compiles(epoch, "sqlite")
def _epoch_sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(epoch, "postgresql")
def _epoch_postgresql(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


class Database:
    """The job table's engine. `read()` and `write()` give a session that is one transaction."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.shown = self.engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, url: str, *, wait_s: float = 60.0) -> Database:
        """Connect, waiting for a database that is still starting, and bring its tables up to date."""
        database = cls(url)
        deadline, pause = time.monotonic() + wait_s, 0.25
        while True:
            try:
                database.migrate()
                return database
            except Unavailable as error:
                if time.monotonic() + pause > deadline or database.engine.dialect.name == "sqlite":
                    raise
                _log.warning("database not ready", error=str(error), retry_s=pause)
            time.sleep(pause)
            pause = min(pause * 2, 8.0)

    def migrate(self) -> None:
        """Upgrade the tables to this release's newest form; safe in several processes at once."""
        config = AlembicConfig()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self._mapped_errors(), self._one_migration(), self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write; on SQLite it takes the write lock at once, so it cannot deadlock."""
        new = Session(self.engine, expire_on_commit=False)
        with self._mapped_errors(), new as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads; it never waits for a writer."""
        engine = self.engine.execution_options(distillery_read_only=True)
        with self._mapped_errors(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            gone = getattr(error.orig, "sqlstate", "") == _UNDEFINED_TABLE
            if isinstance(error, IntegrityError | ProgrammingError | DataError) and not gone:
                raise  # ours, or the caller's
            raise Unavailable(
                f"the job table at {self.shown} cannot be used: {' '.join(str(error.orig).split())}; "
                "check DISTILLERY_DATABASE_URL and that the database runs"
            ) from error

    @contextmanager
    def _one_migration(self) -> Iterator[None]:
        path = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or not path or path == ":memory:":
            yield
            return
        with Path(f"{path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        return create_engine(parsed, pool_pre_ping=True, pool_size=8, max_overflow=24)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(
            f"database URL cannot be used ({error}); give sqlite:////path/to/jobs.db or "
            "postgresql://user:password@host/database",
            field="database_url",
        ) from None


def _sqlite(url: URL) -> Engine:
    path = url.database or ""
    if not path or path == ":memory:":
        raise ConfigError("the job table must be a file: sqlite:////path/to/jobs.db", field="database_url")
    if url.query:
        raise ConfigError(
            f"database URL has the parameter {next(iter(url.query))!r}, and a job table in a file takes none; "
            "write a ? that belongs to the path as %3F",
            field="database_url",
        )
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"the job table's folder {file.parent} cannot be made: {error.strerror}") from error
    try:
        file.touch()
    except OSError as error:
        raise Unavailable(f"the job table {file} cannot be made: {error.strerror}") from error
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    _stay_with(engine, file)
    return engine


def _stay_with(engine: Engine, file: Path) -> None:
    """Use no connection to a file that was removed or replaced, and make no empty one in its place.

    SQLite itself would read and write the unlinked file for ever, beside the one that all later processes use.
    """

    def identify(_dialect: object, record: Any, _arguments: object, _named: object) -> None:
        record.info["file"] = _identity(file)  # before it is opened: who replaces it meanwhile is noticed

    def compare(_connection: object, record: Any, _proxy: object) -> None:
        if record.info["file"] != _identity(file):
            raise DisconnectionError("the file was replaced")  # the pool connects again

    event.listen(engine, "do_connect", identify)
    event.listen(engine, "checkout", compare)


def _identity(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise sqlite3.OperationalError(f"the file cannot be read ({error.strerror})") from None
    return status.st_dev, status.st_ino


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("distillery_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

"""The job table: the truth about every job. All times are seconds since 1970 by the database's clock."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, Integer, String, Text, desc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Sequence = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in INTEGER columns


class State(enum.StrEnum):
    """Of a job. A pipeline's state follows from its stages'."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = (State.SUCCEEDED, State.FAILED, State.CANCELLED)
STOPPED = (State.FAILED, State.CANCELLED)  # what a retry starts again


class Kind(enum.StrEnum):
    """Kind of work that a job does."""

    TRAIN = "train"
    CONVERT = "convert"
    EVALUATE = "evaluate"
    PIPELINE = "pipeline"


QUEUES = {Kind.TRAIN: "train", Kind.CONVERT: "convert", Kind.EVALUATE: "eval", Kind.PIPELINE: ""}
MULTI = "train.multi"  # jobs of several processes, for a worker that owns more than one GPU
QUEUE_NAMES = (*sorted(name for name in QUEUES.values() if name), MULTI)


def processes_of(spec: Mapping[str, Any]) -> int:
    """Number of processes that a job's specification asks for."""
    return int((spec.get("recipe") or {}).get("processes") or 1)


def queue_of(kind: Kind, spec: Mapping[str, Any]) -> str:
    """The queue that a job is put in."""
    return MULTI if kind is Kind.TRAIN and processes_of(spec) > 1 else QUEUES[kind]


class Base(DeclarativeBase):
    """All tables of the job store."""

    type_annotation_map = {dict[str, Any]: JSON, float: Double, str: String(255)}


class Job(Base):
    """One request to run something. `attempt` only grows: a write that names an older one changes nothing."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_claimed", "queue", "state", "waits", desc("priority"), "seq"),
        Index("ix_jobs_listed", "state", "kind", "created", "seq"),
        Index("ix_jobs_created", "created", "seq"),
        Index("ix_jobs_pipeline", "pipeline"),
    )

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(32), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    queue: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(128))
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    priority: Mapped[int]  # higher first
    idempotency_key: Mapped[str | None] = mapped_column(String(128), unique=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    pipeline: Mapped[str | None] = mapped_column(String(32))  # the id of the pipeline this is a stage of
    stage: Mapped[str] = mapped_column(String(64))
    owner: Mapped[str]  # the name of the token, or the address, that submitted it

    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int]  # claims so far; fences writes
    crashes: Mapped[int]  # attempts that ended by themselves without a result; limited by max_attempts
    max_attempts: Mapped[int]
    waits: Mapped[int]  # parents that have not succeeded; claimable at 0
    not_before: Mapped[float]  # not claimed earlier
    worker: Mapped[str]
    lease_until: Mapped[float]
    cancel_requested: Mapped[bool]

    progress: Mapped[dict[str, Any]]  # the child's last progress and metrics
    metrics: Mapped[dict[str, Any]]  # of the result
    artifact: Mapped[str]  # name@version that was published
    error: Mapped[dict[str, Any]]  # type, message, field, log: of the last failure

    created: Mapped[float]
    started: Mapped[float | None]  # of the last attempt
    finished: Mapped[float | None]


class Parent(Base):
    """`job_id` is claimable only when `parent_id` has succeeded."""

    __tablename__ = "job_parents"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class Label(Base):
    """A job's labels once more, so that jobs are found by them; `created` and `seq` are the job's."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels_found", "key", "value", "created", "seq"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(256))
    created: Mapped[float]
    seq: Mapped[int] = mapped_column(Sequence)


class Event(Base):
    """Append-only history: every change of state, and who asked for it."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job", "job_id", "id"),)

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    time: Mapped[float]
    attempt: Mapped[int]
    what: Mapped[str] = mapped_column(String(32))  # submitted, claimed, succeeded, crashed, lease_expired, …
    state: Mapped[str] = mapped_column(String(16))  # the job's state after it
    message: Mapped[str] = mapped_column(Text)
    who: Mapped[str]


class Leader(Base):
    """Holder of a duty that one process at a time should do, and until when."""

    __tablename__ = "job_leaders"

    duty: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str]
    until: Mapped[float]


class Queue(Base):
    """A queue that was paused, or had been: nothing is claimed from it while `paused`."""

    __tablename__ = "job_queues"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    paused: Mapped[bool]
    reason: Mapped[str]
    who: Mapped[str]
    since: Mapped[float]

"""The client's side of the job table: submit, get, cancel, retry. Each call is one transaction."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, defer

from distill_core.errors import ConfigError, NotFound
from distill_service.jobs.database import Database
from distill_service.jobs.specs import Draft, check_pipeline, check_single
from distill_service.jobs.states import (
    PARENT_STOPPED,
    descendants,
    locked,
    move,
    now,
    open_parents,
    record,
    refresh_pipeline,
)
from distill_service.jobs.table import ENDED, STOPPED, Event, Job, Kind, Label, Parent, State, queue_of
from distill_service.status import StatusError

MAX_LABELS = 32
MAX_PRIORITY = 1000
SWEEP = "sweep"  # the label that a sweep's jobs have in common: its first job's id
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


@dataclass(frozen=True)
class Options:
    """Options that a client may give any job."""

    name: str = ""
    priority: int = 0  # -1000 to 1000, higher first
    labels: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str = ""  # the same key and request again gives the first job again
    max_attempts: int = 3
    who: str = ""

    def check(self) -> None:
        """Raise ConfigError for what is out of bounds."""
        if len(self.name) > 128 or not self.name.isprintable():
            raise ConfigError("name is longer than 128 characters or not printable", field="name")
        if abs(self.priority) > MAX_PRIORITY:
            message = f"priority {self.priority} is not within -{MAX_PRIORITY} and {MAX_PRIORITY}"
            raise ConfigError(message, field="priority")
        if len(self.idempotency_key) > 128:
            raise ConfigError("idempotency_key is longer than 128 characters", field="idempotency_key")
        if SWEEP in self.labels:
            raise ConfigError(f"label {SWEEP!r} is given to sweeps only; choose another", field="labels")
        check_labels(self.labels)


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise ConfigError for too many labels, or one of another form than `key=value`."""
    if len(labels) > MAX_LABELS:
        raise ConfigError(f"{len(labels)} labels given, at most {MAX_LABELS}", field="labels")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or len(value) > 256 or not value.isprintable():
            raise ConfigError(
                f"label {key[:64]!r}: a key has 1 to 64 letters, digits, '.', '_', '/', '-' and begins with one "
                "of the first two, a value at most 256 printable characters",
                field="labels",
            )


@dataclass(frozen=True)
class Record:
    """A job, what it waits for, and a pipeline's stages."""

    job: Job
    parents: tuple[str, ...] = ()
    stages: tuple[Job, ...] = ()


def submit(
    db: Database, drafts: Sequence[Draft], options: Options, *, pipeline: bool = False, sweep: bool = False
) -> Record:
    """Queue one job, or the stages of a pipeline or the jobs of a sweep together; of a sweep its first job.

    Raises:
        ConfigError: an option, a reference between stages, or a used-up idempotency key.
    """
    check(drafts, options, pipeline=pipeline, sweep=sweep)
    digest = _digest(drafts, options)
    insert = _insert_pipeline if pipeline else _insert_sweep if sweep else _insert_one
    try:
        with db.write() as session:
            first = _already(session, options.idempotency_key, digest)
            if first is None:
                first = insert(session, drafts, options, digest)
    except IntegrityError:  # the same key was inserted beside us
        with db.write() as session:
            first = _already(session, options.idempotency_key, digest)
        if first is None:
            raise
    return get(db, first)


def check(drafts: Sequence[Draft], options: Options, *, pipeline: bool = False, sweep: bool = False) -> None:
    """Raise the ConfigError that `submit` would, but for the idempotency key's earlier use."""
    options.check()
    if pipeline:
        check_pipeline(drafts)
        return
    for draft in drafts if sweep else drafts[:1]:
        check_single(draft)
        check_labels({**options.labels, **draft.labels, **({SWEEP: ""} if sweep else {})})


def sweep_of(db: Database, first: Job) -> list[Record]:
    """All jobs of a sweep, in the order of its values."""
    labelled = select(Job).join(Label, Label.job_id == Job.id).order_by(Label.seq)
    with db.read() as session:
        jobs = session.scalars(labelled.where(Label.key == SWEEP, Label.value == first.id)).all()
        return records(session, jobs)


def _digest(drafts: Sequence[Draft], options: Options) -> str:
    content = [[d.kind, d.spec, d.stage, list(d.after)] for d in drafts]
    text = json.dumps([content, options.name, options.priority, dict(options.labels)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _already(session: Session, key: str, digest: str) -> str | None:
    if not key:
        return None
    job = session.scalar(select(Job).where(Job.idempotency_key == key))
    if job is not None and job.request_sha256 != digest:
        raise ConfigError(
            f"idempotency key {key!r} was used for another request (job {job.id}); choose a new key",
            field="idempotency_key",
        )
    return job.id if job else None


def _insert_one(session: Session, drafts: Sequence[Draft], options: Options, digest: str) -> str:
    return _new_job(session, drafts[0], options, key=options.idempotency_key, digest=digest).id


def _insert_sweep(session: Session, drafts: Sequence[Draft], options: Options, digest: str) -> str:
    first = secrets.token_hex(6)
    for draft in drafts:
        identity = {"job_id": first, "key": options.idempotency_key, "digest": digest}
        named = replace(options, name=f"{options.name} {draft.name}"[:128].strip())
        own = replace(draft, labels={**draft.labels, SWEEP: first})
        _new_job(session, own, named, **(identity if draft is drafts[0] else {}))
    return first


def _insert_pipeline(session: Session, drafts: Sequence[Draft], options: Options, digest: str) -> str:
    name = options.name or " → ".join(draft.stage for draft in drafts)[:128]
    whole = Draft(Kind.PIPELINE, {"stages": [draft.stage for draft in drafts]}, name)
    row = _new_job(session, whole, options, key=options.idempotency_key, digest=digest)
    ids: dict[str, str] = {}
    for draft in drafts:
        job = _new_job(session, draft, options, pipeline=row.id)
        ids[draft.stage] = job.id
        job.waits = len(draft.parents())
        session.add_all(Parent(job_id=job.id, parent_id=ids[parent]) for parent in draft.parents())
    return row.id


def _new_job(
    session: Session,
    draft: Draft,
    options: Options,
    *,
    job_id: str = "",
    key: str = "",
    digest: str = "",
    pipeline: str | None = None,
) -> Job:
    labels = {**options.labels, **draft.labels}
    job = Job(
        id=job_id or secrets.token_hex(6),
        kind=draft.kind,
        queue=queue_of(draft.kind, draft.spec),
        name=draft.name[:128] if pipeline else options.name or draft.name[:128],
        spec=draft.spec,
        labels=labels,
        priority=options.priority,
        idempotency_key=key or None,
        request_sha256=digest,
        pipeline=pipeline,
        stage=draft.stage if pipeline else "",
        owner=options.who[:255],
        state=State.QUEUED,
        attempt=0,
        crashes=0,
        max_attempts=options.max_attempts,
        waits=0,
        not_before=0.0,
        worker="",
        lease_until=0.0,
        cancel_requested=False,
        progress={},
        metrics={},
        artifact="",
        error={},
        created=now(session),
    )
    session.add(job)
    session.flush()
    session.add_all(
        Label(job_id=job.id, key=key, value=value, created=job.created, seq=job.seq)
        for key, value in labels.items()
    )
    record(session, job, "submitted", who=options.who)
    return job


def get(db: Database, job_id: str) -> Record:
    """A job by its id.

    Raises:
        NotFound: no such job.
    """
    with db.read() as session:
        job = session.scalar(select(Job).where(Job.id == job_id))
        if job is None:
            raise NotFound(f"no job has the id {job_id[:64]!r}; `distillery jobs` lists them", field="id")
        return records(session, [job])[0]


def records(session: Session, jobs: Sequence[Job]) -> list[Record]:
    """Jobs with what they wait for and their stages."""
    ids = [job.id for job in jobs]
    parents: dict[str, list[str]] = {job_id: [] for job_id in ids}
    for row in session.scalars(select(Parent).where(Parent.job_id.in_(ids))):
        parents[row.job_id].append(row.parent_id)
    stages: dict[str, list[Job]] = {job_id: [] for job_id in ids}
    of_them = select(Job).where(Job.pipeline.in_(ids)).order_by(Job.seq)
    for stage in session.scalars(of_them.options(defer(Job.spec))):
        stages[stage.pipeline or ""].append(stage)
    return [Record(job, tuple(sorted(parents[job.id])), tuple(stages[job.id])) for job in jobs]


def events(db: Database, job_id: str, *, after: int = 0, limit: int = 200) -> list[Event]:
    """A job's history after the event with id `after`, oldest first."""
    query = select(Event).where(Event.job_id == job_id, Event.id > after).order_by(Event.id).limit(limit)
    with db.read() as session:
        return list(session.scalars(query))


def cancel(db: Database, job_id: str, *, who: str = "") -> Record:
    """Ask a job, or every stage of a pipeline, to stop. One that waits ends at once, a running one in a step.

    Raises:
        NotFound: no such job. StatusError: it has ended in another way already.
    """
    record = get(db, job_id)
    if record.job.state in (State.SUCCEEDED, State.FAILED):
        raise StatusError(
            "FAILED_PRECONDITION", f"job {job_id} is {record.job.state} already; there is nothing to cancel"
        )
    for stage in reversed(record.stages) if record.stages else (record.job,):
        _cancel_one(db, stage.id, who)
    refresh_pipeline(db, job_id if record.stages else record.job.pipeline)
    return get(db, job_id)


def _cancel_one(db: Database, job_id: str, who: str) -> None:
    with db.write() as session:
        job = locked(session, job_id)
        if job.state == State.QUEUED:
            job.error = {"type": "Cancelled", "message": "cancelled before it started"}
            move(session, job, State.CANCELLED, "cancelled", who=who)
        elif job.state == State.RUNNING and not job.cancel_requested:
            job.cancel_requested = True
            record(session, job, "cancel_requested", who=who)


def retry(db: Database, job_id: str, *, who: str = "") -> Record:
    """Queue a stopped job again, with those that were cancelled because of it; it continues its run.

    Raises:
        NotFound: no such job. StatusError: it has not stopped, or a job that it needs has.
    """
    record = get(db, job_id)
    if record.job.state not in STOPPED:
        raise StatusError(
            "FAILED_PRECONDITION",
            f"job {job_id} is {record.job.state}; only one that FAILED or was CANCELLED can be retried",
        )
    with db.write() as session:
        for stage in record.stages or (record.job,):
            _retry_one(session, stage.id, who, whole=bool(record.stages))
    refresh_pipeline(db, job_id if record.stages else record.job.pipeline)
    return get(db, job_id)


def _retry_one(session: Session, job_id: str, who: str, *, whole: bool) -> None:
    job = locked(session, job_id)
    if job.state not in STOPPED:
        return
    stopped = None if whole else _stopped_parent(session, job_id)
    if stopped is not None:
        raise StatusError(
            "FAILED_PRECONDITION",
            f"job {job_id} needs {stopped.stage or stopped.name} ({stopped.id}), which is {stopped.state}; "
            "retry that one",
        )
    _requeue(session, job, who)
    for child in descendants(session, job_id):
        if child.state == State.CANCELLED and child.error.get("type") == PARENT_STOPPED:
            _requeue(session, child, who)


def _stopped_parent(session: Session, job_id: str) -> Job | None:
    query = select(Job).join(Parent, Parent.parent_id == Job.id)
    return session.scalar(query.where(Parent.job_id == job_id, Job.state.in_(STOPPED)).limit(1))


def _requeue(session: Session, job: Job, who: str) -> None:
    job.waits = open_parents(session, job.id)
    job.crashes, job.not_before, job.error, job.cancel_requested = 0, 0.0, {}, False
    move(session, job, State.QUEUED, "retried", who=who)


def ready_queues(record: Record) -> set[str]:
    """Queues to announce after a job or pipeline was queued."""
    return {job.queue for job in record.stages or (record.job,) if job.state not in ENDED}

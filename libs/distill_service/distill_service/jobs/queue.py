"""The worker's side of the job table: claim, renew, report, finish, reap. Each call is one transaction.

A claim raises the job's `attempt`; every later write names it, and changes nothing after another claim.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from distill_core.errors import ConfigError
from distill_service.jobs.database import Database, epoch
from distill_service.jobs.specs import substitute
from distill_service.jobs.states import locked, move, now, record, refresh_pipeline, stale_pipelines
from distill_service.jobs.table import Job, Kind, Leader, Parent, Queue, State

KEPT = (
    "kept"  # the step of the newest checkpoint, in a job's progress, and in its error that of the last crash
)
MAX_DELAY_S = 300.0  # before a job that went back to its queue may be claimed again
Verdict = Literal["succeeded", "failed", "cancelled", "preempted", "crashed"]
_STATES = {"succeeded": State.SUCCEEDED, "failed": State.FAILED, "cancelled": State.CANCELLED}


@dataclass(frozen=True)
class Claim:
    """A job that is now ours to run, under a lease."""

    id: str
    attempt: int
    kind: str
    name: str
    spec: dict[str, Any]  # references to earlier stages replaced
    crashes: int = 0
    pipeline: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Outcome of an attempt. `preempted` and `crashed` put the job back; only the latter counts against it.

    It counts anew from the first crash after a new checkpoint: a long job may lose many workers.
    """

    verdict: Verdict
    artifact: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)  # type, message, field, log
    delay_s: float = 0.0  # of a job that goes back to its queue, before it is claimed again
    progress: dict[str, Any] = field(default_factory=dict)


def claim(db: Database, queues: Collection[str], *, worker: str, lease_s: float) -> Claim | None:
    """Take the most urgent job of `queues` that may run now, or None."""
    while True:
        with db.write() as session:
            job = _take(session, queues, worker, lease_s)
            if job is None:
                return None
            try:
                spec = substitute(job.spec, _parent_artifacts(session, job.id))
            except ConfigError as error:  # a parent published nothing
                job.error = {"type": "ConfigError", "message": str(error), "field": error.field or ""}
                move(session, job, State.FAILED, "failed", message=str(error), who=worker)
                spec = None
            else:
                record(session, job, "claimed", who=worker)
        refresh_pipeline(db, job.pipeline)
        if spec is not None:
            return Claim(job.id, job.attempt, job.kind, job.name, spec, job.crashes, job.pipeline)


def claimable(queue: str) -> ColumnElement[bool]:
    """The condition under which a job of `queue` may be claimed now, pauses aside."""
    ready = (Job.state == State.QUEUED) & (Job.waits == 0) & _past(Job.not_before, within=MAX_DELAY_S)
    return (Job.queue == queue) & ready


def _past(moment: InstrumentedAttribute[float], *, within: float) -> ColumnElement[bool]:
    """Whether a time that was set at most `within` seconds ahead has come.

    One that is further ahead was written before the clock was set back; waiting for it could take days.
    """
    return (moment <= epoch()) | (moment > epoch() + within)


def _by_urgency(session: Session, queues: Collection[str]) -> list[str]:
    """The queues that are not paused and hold claimable jobs, the one with the most urgent job first.

    A question for each queue, since an index holds the jobs of one queue in their order, not those of several.
    """
    paused = set(session.scalars(select(Queue.name).where(Queue.paused)))
    heads = []
    for queue in sorted(set(queues) - paused):
        first = select(Job.priority, Job.seq).where(claimable(queue))
        row = session.execute(first.order_by(Job.priority.desc(), Job.seq).limit(1)).first()
        if row is not None:
            heads.append((-row.priority, row.seq, queue))
    return [queue for *_, queue in sorted(heads)]


def _take(session: Session, queues: Collection[str], worker: str, lease_s: float) -> Job | None:
    taken = (_take_from(session, queue, worker, lease_s) for queue in _by_urgency(session, queues))
    return next((job for job in taken if job is not None), None)


def _take_from(session: Session, queue: str, worker: str, lease_s: float) -> Job | None:
    first = (
        select(Job.seq)
        .where(claimable(queue))
        .order_by(Job.priority.desc(), Job.seq)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)  # PostgreSQL; SQLite has one writer at a time anyway
    )
    taken = (
        update(Job)
        .where(Job.seq == first.scalar_subquery(), Job.state == State.QUEUED)
        .values(
            state=State.RUNNING,
            attempt=Job.attempt + 1,
            worker=worker,
            lease_until=epoch() + lease_s,
            started=epoch(),
            cancel_requested=False,
        )
        .returning(Job)
    )
    return session.scalars(taken, execution_options={"synchronize_session": False}).one_or_none()


def _parent_artifacts(session: Session, job_id: str) -> dict[str, str]:
    query = select(Job.stage, Job.artifact).join(Parent, Parent.parent_id == Job.id)
    return {stage: artifact for stage, artifact in session.execute(query.where(Parent.job_id == job_id))}


def heartbeat(
    db: Database, job_id: str, attempt: int, *, lease_s: float, progress: dict[str, Any] | None = None
) -> bool | None:
    """Renew the lease and store progress. True: a cancel was asked for; None: superseded, stop at once."""
    values: dict[str, Any] = {"lease_until": epoch() + lease_s}
    if progress is not None:
        values["progress"] = progress
    renew = update(Job).where(*_ours(job_id, attempt)).values(values).returning(Job.cancel_requested)
    with db.write() as session:
        return session.scalar(renew, execution_options={"synchronize_session": False})


def cancel_requested(db: Database, job_id: str, attempt: int) -> bool | None:
    """Answer of `heartbeat`, without a write."""
    with db.read() as session:
        return session.scalar(select(Job.cancel_requested).where(*_ours(job_id, attempt)))


def _ours(job_id: str, attempt: int) -> tuple[ColumnElement[bool], ...]:
    return Job.id == job_id, Job.attempt == attempt, Job.state == State.RUNNING


def finish(db: Database, job_id: str, attempt: int, outcome: Outcome, *, who: str = "") -> bool:
    """End an attempt. False, and nothing changes, if the job is no longer at this attempt."""
    with db.write() as session:
        job = locked(session, job_id)
        if job.attempt != attempt or job.state != State.RUNNING:
            return False
        _end_attempt(session, job, outcome, who)
    refresh_pipeline(db, job.pipeline)
    return True


def _end_attempt(session: Session, job: Job, outcome: Outcome, who: str) -> None:
    message = str(outcome.error.get("message", ""))
    kept_before, job.error = job.error.get(KEPT, 0), outcome.error
    if outcome.progress:
        job.progress = outcome.progress
    if outcome.verdict in _STATES:
        job.artifact, job.metrics = outcome.artifact, outcome.metrics
        move(session, job, _STATES[outcome.verdict], outcome.verdict, message=message, who=who)
        return
    kept = kept_before
    if outcome.verdict == "crashed":
        kept = max(kept_before, job.progress.get(KEPT, 0))
        job.crashes = job.crashes + 1 if kept == kept_before else 1
    job.error = {**outcome.error, KEPT: kept} if kept else outcome.error
    if job.cancel_requested:
        move(session, job, State.CANCELLED, "cancelled", message=message, who=who)
    elif job.crashes >= job.max_attempts:
        message = f"{message}; given up after {job.crashes} attempts"
        job.error = {**job.error, "message": message}
        move(session, job, State.FAILED, "failed", message=message, who=who)
    else:
        job.not_before = now(session) + min(outcome.delay_s, MAX_DELAY_S)
        move(session, job, State.QUEUED, outcome.verdict, message=message, who=who)


def child_queues(db: Database, job_id: str) -> set[str]:
    """Queues to announce after a job has succeeded: those of the jobs that waited for it."""
    query = select(Job.queue).join(Parent, Parent.job_id == Job.id).where(Parent.parent_id == job_id)
    with db.read() as session:
        return set(session.scalars(query))


def waiting(db: Database, queues: Collection[str]) -> bool:
    """Whether any job of `queues` may be claimed now."""
    with db.read() as session:
        return bool(_by_urgency(session, queues))


def lead(db: Database, duty: str, *, holder: str, for_s: float) -> bool:
    """Whether `holder` does this duty for the next `for_s` seconds; True for one caller only."""
    take = (
        update(Leader)
        .where(Leader.duty == duty, _past(Leader.until, within=for_s))
        .values(holder=holder, until=epoch() + for_s)
        .returning(Leader.duty)
    )
    with db.write() as session:
        return session.scalar(take, execution_options={"synchronize_session": False}) is not None


def reap(db: Database, *, who: str = "reaper", longest_lease_s: float = 3600.0) -> list[str]:
    """Requeue the jobs whose lease has run out, and bring pipelines up to date. Returns the jobs' ids.

    No worker's lease may be longer than `longest_lease_s`.
    """
    late = (
        (Job.state == State.RUNNING)
        & _past(Job.lease_until, within=longest_lease_s)
        & (Job.kind != Kind.PIPELINE)
    )
    query = select(Job).where(late).order_by(Job.seq)
    with db.write() as session:
        expired = list(session.scalars(query.with_for_update(skip_locked=True, of=Job)))
        for job in expired:
            message = f"worker {job.worker} fell silent during attempt {job.attempt}"
            record(session, job, "lease_expired", message=message, who=who)
            error = {"type": "LeaseExpired", "message": message}
            _end_attempt(session, job, Outcome("crashed", error=error), who)
        stale = stale_pipelines(session)
    for pipeline in stale:
        refresh_pipeline(db, pipeline)
    return [job.id for job in expired]

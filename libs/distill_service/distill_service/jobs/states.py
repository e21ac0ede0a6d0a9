"""Changes of a job's state: done, recorded, and carried to its children and pipeline in one place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from distill_core.errors import NotFound
from distill_service.jobs.database import Database, epoch
from distill_service.jobs.table import ENDED, STOPPED, Event, Job, Kind, Parent, State

PARENT_STOPPED = "ParentStopped"  # error type of a job that was cancelled because its parent stopped


def now(session: Session) -> float:
    """The database's clock."""
    value: float | None = session.scalar(select(epoch()))
    assert value is not None
    return value


def locked(session: Session, job_id: str) -> Job:
    """The job's row, ours until the transaction ends.

    Raises:
        NotFound: no such job.
    """
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise NotFound(f"no job has the id {job_id[:64]!r}; `distillery jobs` lists them", field="id")
    return job


def move(session: Session, job: Job, state: State, what: str, *, message: str = "", who: str = "") -> None:
    """Put a locked job into `state` and record why; those that wait for it are released, or cancelled."""
    job.state = state
    if state is State.QUEUED:
        job.finished, job.lease_until, job.worker = None, 0.0, ""
    if state in ENDED:
        job.finished, job.lease_until = now(session), 0.0
    record(session, job, what, message=message, who=who)
    if state is State.SUCCEEDED:
        _release_children(session, job)
    elif state in STOPPED:
        _cancel_waiting(session, job)


def record(session: Session, job: Job, what: str, *, message: str = "", who: str = "") -> None:
    """Append to the job's history."""
    session.add(
        Event(
            job_id=job.id,
            time=now(session),
            attempt=job.attempt,
            what=what,
            state=job.state,
            message=message,
            who=who[:255],
        )
    )


def descendants(session: Session, job_id: str) -> list[Job]:
    """All jobs that wait for this one, directly or not; locked in the order of submission, parents first."""
    found: set[str] = set()
    frontier = {job_id}
    while frontier:
        children = select(Parent.job_id).where(Parent.parent_id.in_(frontier))
        frontier = set(session.scalars(children)) - found
        found |= frontier
    return list(session.scalars(select(Job).where(Job.id.in_(found)).order_by(Job.seq).with_for_update()))


def open_parents(session: Session, job_id: str) -> int:
    """Number of a job's parents that have not succeeded."""
    query = select(func.count()).select_from(Parent).join(Job, Job.id == Parent.parent_id)
    return session.scalar(query.where(Parent.job_id == job_id, Job.state != State.SUCCEEDED)) or 0


def _release_children(session: Session, parent: Job) -> None:
    """Count anew, under the children's locks: of two parents that succeed at once, the second sees the first."""
    session.flush()
    children = select(Job).join(Parent, Parent.job_id == Job.id).where(Parent.parent_id == parent.id)
    for child in session.scalars(children.order_by(Job.seq).with_for_update(of=Job)).all():
        child.waits = open_parents(session, child.id)


def _cancel_waiting(session: Session, parent: Job) -> None:
    for job in descendants(session, parent.id):
        if job.state != State.QUEUED:
            continue
        message = (
            f"not started: {parent.stage or parent.name} ({parent.id}), which it needs, is {parent.state}"
        )
        job.state, job.finished = State.CANCELLED, now(session)
        job.error = {"type": PARENT_STOPPED, "message": f"{message}; retry that job and this one follows"}
        record(session, job, "parent_stopped", message=message)


def refresh_pipeline(db: Database, pipeline: str | None) -> None:
    """Bring a pipeline's own row in line with its stages. Called after each change, and by the reaper."""
    if pipeline is None:
        return
    with db.write() as session:
        row = locked(session, pipeline)
        stages = list(session.scalars(select(Job).where(Job.pipeline == pipeline).order_by(Job.seq)))
        state = pipeline_state(stage.state for stage in stages)
        row.artifact = next((stage.artifact for stage in reversed(stages) if stage.artifact), "")
        started = [stage.started for stage in stages if stage.started is not None]
        row.started = min(started, default=None)
        row.error = _first_error(stages) if state is State.FAILED else {}
        if row.state != state:
            row.state = state
            row.finished = now(session) if state in ENDED else None
            record(session, row, state.lower())


def pipeline_state(states: Iterable[str]) -> State:
    """A pipeline's state from its stages': it goes on as long as any of them can."""
    distinct = set(states)
    if distinct == {State.SUCCEEDED}:
        return State.SUCCEEDED
    if distinct == {State.QUEUED}:
        return State.QUEUED
    if distinct & {State.QUEUED, State.RUNNING}:
        return State.RUNNING
    return State.FAILED if State.FAILED in distinct else State.CANCELLED


def _first_error(stages: list[Job]) -> dict[str, Any]:
    failed = next(stage for stage in stages if stage.state == State.FAILED)
    message = failed.error.get("message", "")
    return {**failed.error, "message": f"stage {failed.stage} ({failed.id}): {message}"}


def stale_pipelines(session: Session) -> list[str]:
    """Pipelines whose row says another state than their stages: somebody ended between the two writes."""
    unended = select(Job).where(Job.kind == Kind.PIPELINE, Job.state.in_((State.QUEUED, State.RUNNING)))
    recorded = {
        job_id: state for job_id, state in session.execute(unended.with_only_columns(Job.id, Job.state))
    }
    stages: dict[str, set[str]] = {}
    of_them = Job.pipeline.in_(unended.with_only_columns(Job.id))
    for pipeline, state in session.execute(select(Job.pipeline, Job.state).where(of_them).distinct()):
        stages.setdefault(pipeline or "", set()).add(state)
    return [job_id for job_id, found in stages.items() if pipeline_state(found) != recorded[job_id]]

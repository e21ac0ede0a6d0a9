"""Pausing queues. A pause is a row of the job table, so it holds on every broker and outlives any restart."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from distill_core.errors import NotFound, nearest
from distill_service.jobs.database import Database
from distill_service.jobs.states import now
from distill_service.jobs.table import QUEUE_NAMES, Job, Queue, State

_MAX_REASON = 255


@dataclass(frozen=True)
class QueueState:
    """A queue: what waits in it, what runs, and whether it is paused."""

    name: str
    queued: int
    running: int
    paused: bool = False
    reason: str = ""
    who: str = ""
    since: float | None = None  # seconds since 1970, of the last pause or resumption


def set_paused(db: Database, name: str, paused: bool, *, reason: str = "", who: str = "") -> QueueState:
    """Pause a queue, or let it go on; what runs is not touched. The same again changes nothing.

    Raises:
        NotFound: no such queue.
    """
    if name not in QUEUE_NAMES:
        raise NotFound(f"no queue is called {name[:64]!r}{nearest(name[:64], QUEUE_NAMES)}", field="name")
    try:
        _write(db, name, paused, reason[:_MAX_REASON], who[:255])
    except IntegrityError:  # its row was made beside us
        _write(db, name, paused, reason[:_MAX_REASON], who[:255])
    return next(queue for queue in queue_states(db) if queue.name == name)


def _write(db: Database, name: str, paused: bool, reason: str, who: str) -> None:
    with db.write() as session:
        row = session.get(Queue, name, with_for_update=True)
        if row is not None and row.paused == paused:
            return
        if row is None:
            session.add(Queue(name=name, paused=paused, reason=reason, who=who, since=now(session)))
        else:
            row.paused, row.reason, row.who, row.since = paused, reason, who, now(session)


def queue_states(db: Database) -> list[QueueState]:
    """All queues, by name."""
    counted = select(Job.queue, Job.state, func.count()).where(Job.queue != "")
    counted = counted.where(Job.state.in_((State.QUEUED, State.RUNNING))).group_by(Job.queue, Job.state)
    with db.read() as session:
        counts = {(queue, state): count for queue, state, count in session.execute(counted)}
        rows = {row.name: row for row in session.scalars(select(Queue))}
    names = sorted({*QUEUE_NAMES, *rows, *(queue for queue, _ in counts)})
    return [_state(name, counts, rows.get(name)) for name in names]


def _state(name: str, counts: dict[tuple[str, str], int], row: Queue | None) -> QueueState:
    queued, running = counts.get((name, State.QUEUED), 0), counts.get((name, State.RUNNING), 0)
    if row is None:
        return QueueState(name, queued, running)
    return QueueState(name, queued, running, row.paused, row.reason, row.who, row.since)

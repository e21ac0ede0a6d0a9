"""Lists of jobs: newest first, filtered, in pages that new jobs do not shift.

Each query walks an index in the order of the page, so it reads a page's worth of rows however long the table is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Select, exists, select, tuple_, union_all
from sqlalchemy.orm import Session, aliased, defer

from distill_core.errors import ConfigError
from distill_service.jobs.database import Database
from distill_service.jobs.requests import Record, check_labels, records
from distill_service.jobs.table import Job, Kind, Label, State

DEFAULT_PAGE = 50
MAX_PAGE = 500
_PLACE = struct.Struct(">dq8s")  # created, seq, and a digest of the filters


@dataclass(frozen=True)
class Filters:
    """Filters of jobs; all of them must hold. Times are seconds since 1970."""

    states: Collection[State] = ()  # none: all
    kinds: Collection[Kind] = ()  # none: all
    labels: Mapping[str, str] = field(default_factory=dict)
    created_after: float | None = None  # this moment included
    created_before: float | None = None  # this one not

    def check(self) -> None:
        """Raise ConfigError for labels that no job can have, and for times in the wrong order."""
        check_labels(self.labels)
        after, before = self.created_after, self.created_before
        if after is not None and before is not None and after >= before:
            raise ConfigError("created_after is not earlier than created_before", field="created_after")

    def digest(self) -> bytes:
        """Eight bytes that differ for other filters."""
        values: list[Any] = [sorted(self.states), sorted(self.kinds), sorted(self.labels.items())]
        values += [self.created_after, self.created_before]
        return hashlib.sha256(json.dumps(values).encode()).digest()[:8]


@dataclass(frozen=True)
class _Place:
    """End of a page: the last job's time and number."""

    created: float
    seq: int


def list_jobs(
    db: Database, filters: Filters | None = None, *, page_size: int = 0, page_token: str = ""
) -> tuple[list[Record], str]:
    """Jobs, newest first, and the token of the next page ("" on the last). Jobs come without their specs.

    Raises:
        ConfigError: a size out of bounds, a filter that cannot be, a token of another list.
    """
    chosen = filters or Filters()
    chosen.check()
    if not 0 <= page_size <= MAX_PAGE:
        raise ConfigError(f"page_size {page_size} is not within 1 and {MAX_PAGE}", field="page_size")
    size = page_size or DEFAULT_PAGE
    place = _read_token(page_token, chosen) if page_token else None
    with db.read() as session:
        jobs = _page(session, chosen, place, size + 1)
        token = _token(jobs[size - 1], chosen) if len(jobs) > size else ""
        return records(session, jobs[:size]), token


def _token(job: Job, filters: Filters) -> str:
    return base64.urlsafe_b64encode(_PLACE.pack(job.created, job.seq, filters.digest())).decode()


def _read_token(token: str, filters: Filters) -> _Place:
    try:
        created, seq, digest = _PLACE.unpack(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, struct.error, ValueError):  # ValueError: not ASCII
        created, seq, digest = math.nan, 0, b""
    if not math.isfinite(created) or digest != filters.digest():
        raise ConfigError(
            "page_token is not one that List gave for these filters; ask for the first page without one",
            field="page_token",
        )
    return _Place(created, seq)


def _page(session: Session, filters: Filters, place: _Place | None, limit: int) -> Sequence[Job]:
    if filters.labels:
        query = _labelled(filters, place)
    elif filters.states or filters.kinds:
        query = _of_states(filters, place, limit)
    else:
        query = select(Job).where(*_between(Job, filters, place)).order_by(*_newest_first(Job))
    return session.scalars(query.options(defer(Job.spec)).limit(limit)).all()


def _newest_first(of: Any) -> tuple[ColumnElement[Any], ...]:
    return of.created.desc(), of.seq.desc()


def _between(of: Any, filters: Filters, place: _Place | None) -> list[ColumnElement[bool]]:
    """The conditions on time and page, on the columns of an index."""
    conditions = []
    if filters.created_after is not None:
        conditions.append(of.created >= filters.created_after)
    if filters.created_before is not None:
        conditions.append(of.created < filters.created_before)
    if place is not None:
        conditions.append(tuple_(of.created, of.seq) < tuple_(place.created, place.seq))
    return conditions


def _of_states(filters: Filters, place: _Place | None, limit: int) -> Select[Any]:
    """The newest of each state and kind by its own part of the index, then the newest of these."""
    parts = []
    for state, kind in itertools.product(filters.states or State, filters.kinds or Kind):
        part = select(Job.seq).where(Job.state == state, Job.kind == kind, *_between(Job, filters, place))
        newest = part.order_by(*_newest_first(Job)).limit(limit).subquery()
        parts.append(select(newest.c.seq))
    return select(Job).where(Job.seq.in_(union_all(*parts))).order_by(*_newest_first(Job))


def _labelled(filters: Filters, place: _Place | None) -> Select[Any]:
    """The jobs of one label by its index; the other conditions are looked up for each."""
    (key, value), *others = sorted(filters.labels.items())
    query = select(Job).join(Label, Label.job_id == Job.id)
    query = query.where(Label.key == key, Label.value == value, *_between(Label, filters, place))
    for other_key, other_value in others:
        other = aliased(Label)
        has = exists().where(other.job_id == Job.id, other.key == other_key, other.value == other_value)
        query = query.where(has)
    if filters.states:
        query = query.where(Job.state.in_(filters.states))
    if filters.kinds:
        query = query.where(Job.kind.in_(filters.kinds))
    return query.order_by(*_newest_first(Label))

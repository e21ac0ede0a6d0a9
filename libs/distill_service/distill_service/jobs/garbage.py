"""Run folders and models that nothing needs any more: found, and removed.

What an alias, a job that has not ended or may yet be retried, or a kept model's parents refer to stays.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, aliased

from distill_core.artifacts import ArtifactStore
from distill_core.artifacts.garbage import StoreGarbage, find_garbage, remove_upload, remove_version
from distill_core.errors import ConfigError
from distill_service.jobs.database import Database
from distill_service.jobs.states import now
from distill_service.jobs.table import ENDED, STOPPED, Event, Job, Parent

DEFAULT_KEEP = 3
DEFAULT_OLDER_THAN_S = 30 * 86_400.0
_MAX_AGE_S = 100 * 365 * 86_400.0
_JOB_ID = re.compile(r"[0-9a-f]{12}")
_TRASH = ".garbage-"  # a run folder on its way out
_CHUNK = 500
_IN_FLIGHT = 10_000  # events with smaller numbers may still be committed after this many later ones
_log = structlog.get_logger("distillery.jobs")


@dataclass(frozen=True)
class Rules:
    """Rules for what stays as it is new: the newest `keep` of each model and of each run's name, and what is young."""

    keep: int = DEFAULT_KEEP
    older_than_s: float = DEFAULT_OLDER_THAN_S

    def check(self) -> None:
        """Raise ConfigError for what is out of bounds."""
        if not 1 <= self.keep <= 1_000_000:
            raise ConfigError(f"keep {self.keep} is not 1 or more", field="keep")
        if not (math.isfinite(self.older_than_s) and 0 <= self.older_than_s <= _MAX_AGE_S):
            message = f"older_than {self.older_than_s} s is not within 0 and 100 years"
            raise ConfigError(message, field="older_than_seconds")


@dataclass(frozen=True)
class Garbage:
    """One thing that was removed, or would be."""

    kind: Literal["run", "model", "upload"]
    name: str  # a job's id, or name@version
    size: int  # bytes
    age_s: float


@dataclass(frozen=True)
class Collected:
    """Garbage that was removed, or would be; and which old models stay for what reason."""

    garbage: tuple[Garbage, ...]
    kept: Mapping[str, str]


def collect(db: Database, runs: Path, store: ArtifactStore, rules: Rules, *, dry_run: bool) -> Collected:
    """Remove what nothing needs; with `dry_run` only say what that is.

    Raises:
        ConfigError: rules out of bounds. Unavailable: the store cannot be written.
    """
    rules.check()
    garbage = list(_runs(db, runs, rules, dry_run))
    with db.read() as session:
        mark = (session.scalar(select(func.max(Event.id))) or 0) - _IN_FLIGHT
        needed = _needed(session, rules)
        open_jobs = _unended(session, rules)
    found = find_garbage(store, keep=rules.keep, older_than_s=rules.older_than_s, needed=needed)
    garbage += _models(db, store, rules, found, (open_jobs, mark), dry_run)
    if not dry_run:
        _log.info("garbage collected", removed=len(garbage), bytes=sum(thing.size for thing in garbage))
    return Collected(tuple(garbage), found.kept or {})


def _models(
    db: Database,
    store: ArtifactStore,
    rules: Rules,
    found: StoreGarbage,
    seen: tuple[set[str], int],
    dry_run: bool,
) -> Iterator[Garbage]:
    """`seen`: the open jobs when the search began, and the last event then; later ones are asked for anew."""
    open_jobs, mark = seen

    def unneeded(ref: str) -> bool:
        """Asked anew right before a removal, and after it became invisible."""
        with db.read() as session:
            needed = {*_needed(session, rules, after_event=mark)}
        aliases = store.aliases(ref.partition("@")[0])
        named = {
            f"{ref.partition('@')[0]}@{version}" for alias, version in aliases.items() if alias != "latest"
        }
        return ref not in named and not any(_same(store, ref, other) for other in needed)

    for version in found.versions:
        if dry_run or remove_version(store, version, partial(unneeded, version.ref)):
            yield Garbage("model", version.ref, version.size, version.age_s)
    for upload in found.uploads:
        if upload.claimed_by in open_jobs:
            continue
        if dry_run or remove_upload(store, upload, partial(_given_up, db, rules, upload.claimed_by)):
            yield Garbage("upload", upload.ref, upload.size, upload.age_s)


def _same(store: ArtifactStore, ref: str, other: str) -> bool:
    """Whether a reference means this version, also while its manifest is out of sight."""
    name, _, alias = other.partition("@")
    if name != ref.partition("@")[0]:
        return False
    return other == ref or f"{name}@{store.aliases(name).get(alias or 'latest')}" == ref


def _unended(session: Session, rules: Rules) -> set[str]:
    """Jobs that have not ended, or that may yet be retried: stopped ones that are young."""
    return set(session.scalars(select(Job.id).where(_is_open(session, rules))))


def _given_up(db: Database, rules: Rules, job_id: str) -> bool:
    """Whether the job that began an upload will not go on with it."""
    with db.read() as session:
        query = select(Job.id).where(Job.id == job_id, _is_open(session, rules))
        return session.scalar(query) is None


def _is_open(session: Session, rules: Rules) -> Any:
    young = Job.finished > now(session) - rules.older_than_s
    return or_(Job.state.not_in(ENDED), Job.state.in_(STOPPED) & young)


def _needed(session: Session, rules: Rules, *, after_event: int | None = None) -> dict[str, str]:
    """Whatever could name a model in the requests of open jobs, and what the stages before them published.

    With `after_event` of those jobs only that something has happened to since.
    """
    reasons: dict[str, str] = {}
    open_job = _is_open(session, rules)
    if after_event is not None:
        open_job &= Job.id.in_(select(Event.job_id).where(Event.id > after_event))
    for job_id, spec in session.execute(
        select(Job.id, Job.spec).where(open_job).execution_options(yield_per=_CHUNK)
    ):
        reasons |= {text: f"needed by job {job_id}" for text in _texts(spec)}
    parent = aliased(Job)
    published = select(Job.id, parent.artifact).join(Parent, Parent.job_id == Job.id)
    published = published.join(parent, parent.id == Parent.parent_id).where(open_job, parent.artifact != "")
    reasons |= {artifact: f"needed by job {job_id}" for job_id, artifact in session.execute(published)}
    return reasons


def _texts(value: Any) -> Iterator[str]:
    """Every text in a request that may be a reference; that one too many is kept does no harm."""
    if isinstance(value, str):
        if 0 < len(value) <= 200:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _runs(db: Database, runs: Path, rules: Rules, dry_run: bool) -> Iterator[Garbage]:
    """Folders of jobs that ended long ago. A folder that no job of the table made is nobody's to remove."""
    if not dry_run:
        for left in runs.glob(f"{_TRASH}*"):  # by a collection that was cut off
            shutil.rmtree(left, ignore_errors=True)
    for job, age in _old_runs(db, _folders(runs), rules):
        size = _size(runs / job)
        if dry_run or _remove_run(db, runs, job, rules):
            yield Garbage("run", job, size, age)


def _folders(runs: Path) -> list[str]:
    try:
        return [entry.name for entry in runs.iterdir() if _JOB_ID.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []


def _old_runs(db: Database, folders: Sequence[str], rules: Rules) -> list[tuple[str, float]]:
    """Ids and ages of the jobs whose folders may go: ended, old, and not the newest of their name."""
    pipeline = aliased(Job)
    columns = (Job.id, Job.kind, Job.name, Job.state, Job.finished, pipeline.state)
    query = select(*columns).outerjoin(pipeline, pipeline.id == Job.pipeline)
    rows: list[Any] = []
    with db.read() as session:
        moment = now(session)
        for start in range(0, len(folders), _CHUNK):
            rows += session.execute(query.where(Job.id.in_(folders[start : start + _CHUNK])))
    seen: dict[tuple[str, str], int] = {}
    old = []
    for job, kind, name, state, finished, whole in sorted(rows, key=lambda row: -(row[4] or math.inf)):
        if state not in ENDED or (whole is not None and whole not in ENDED) or finished is None:
            continue
        seen[kind, name] = rank = seen.get((kind, name), 0) + 1
        if rank > rules.keep and moment - finished >= rules.older_than_s:
            old.append((job, moment - finished))
    return old


def _remove_run(db: Database, runs: Path, job_id: str, rules: Rules) -> bool:
    """Take a folder out of sight while no worker can take its job, then remove it."""
    trash = runs / f"{_TRASH}{job_id}-{secrets.token_hex(4)}"
    with _locked_folder(runs / job_id) as ours, db.write() as session:
        state = session.scalar(select(Job.state).where(Job.id == job_id).with_for_update())
        if not ours or state not in ENDED:
            return False
        os.replace(runs / job_id, trash)
    shutil.rmtree(trash, ignore_errors=True)
    return True


@contextmanager
def _locked_folder(folder: Path) -> Iterator[bool]:
    """Whether no process works in a run folder; none begins to, within the block."""
    try:
        lock = (folder / ".lock").open("a")
    except OSError:
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

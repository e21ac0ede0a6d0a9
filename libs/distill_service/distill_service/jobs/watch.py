"""Follows jobs from the table and their run folders: any number of watchers, and no worker is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill_service.jobs import requests
from distill_service.jobs.database import Database
from distill_service.jobs.table import ENDED, Event, Job

_EVENTS = 200  # of each kind, at most this much is sent per look
_METRICS_BYTES = 256 * 1024
_LOG_BYTES = 64 * 1024
_SAMPLES = 8
MAX_SAMPLE_BYTES = 4 * 2**20
_SAMPLE_NAME = re.compile(r"^(\d{1,12})[A-Za-z0-9_-]*\.png$")
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Cursor:
    """Position up to which a job has been watched."""

    event: int = 0
    metrics_offset: int = 0
    log_offset: int = 0
    sample: str = ""


@dataclass(frozen=True)
class SampleNotice:
    """A picture in the run folder."""

    step: int
    name: str
    data: bytes = b""


@dataclass(frozen=True)
class Notice:
    """Something that happened to a job, and the cursor from which to go on after it."""

    job_id: str
    what: Literal["change", "progress", "metrics", "sample", "log", "job"]
    value: Event | Mapping[str, Any] | SampleNotice | str | requests.Record
    cursor: Cursor


@dataclass(frozen=True)
class Options:
    """Options of a watcher."""

    cursors: Mapping[str, Cursor] = field(default_factory=dict)
    with_samples: bool = False
    with_log: bool = False
    only_new: bool = False


class Watch:
    """All that happens to a job, or to a pipeline and its stages. Call `look` until `ended`."""

    def __init__(self, db: Database, runs: Path, job_id: str, options: Options) -> None:
        self._db, self._runs, self.job_id, self.options = db, runs, job_id, options
        self._followers: dict[str, _Follower] = {}
        self._announced = False
        self.ended = False

    def look(self) -> list[Notice]:
        """News since the last look.

        Raises:
            NotFound: no such job.
        """
        record = requests.get(self._db, self.job_id)
        notices = [notice for job in (record.job, *record.stages) for notice in self._news(job)]
        self.ended = record.job.state in ENDED and not notices
        if self.ended or not self._announced:
            cursor = self._followers[self.job_id].cursor
            notices.insert(0, Notice(self.job_id, "job", record, cursor))
            self._announced = True
        return notices

    def cursors(self) -> dict[str, Cursor]:
        """Position up to which each job has been watched."""
        return {job_id: follower.cursor for job_id, follower in self._followers.items()}

    def position(self) -> Hashable:
        """Streams that are wanted, and the position in each: two at equal positions find the same from there on."""
        streams = self.options.with_samples, self.options.with_log
        return streams, frozenset(follower.position() for follower in self._followers.values())

    def _news(self, job: Job) -> list[Notice]:
        return self._follower(job).look(self._db, job)

    def _follower(self, job: Job) -> _Follower:
        if job.id not in self._followers:
            follower = _Follower(self._runs / job.id, job.id, self.options)
            if self.options.only_new and job.id not in self.options.cursors:
                follower.skip(self._db)
            self._followers[job.id] = follower
        return self._followers[job.id]


class _Follower:
    """One job's events, metrics, samples and log after a cursor."""

    def __init__(self, run_dir: Path, job_id: str, options: Options) -> None:
        self._run_dir, self._job_id, self._options = run_dir, job_id, options
        self.cursor = options.cursors.get(job_id, Cursor())
        self._progress: dict[str, Any] = {}

    def look(self, db: Database, job: Job) -> list[Notice]:
        notices = [*self._changes(db), *self._metrics(), *self._samples()]
        if self._options.with_log:
            notices += self._log()
        if job.progress and job.progress != self._progress:
            self._progress = job.progress
            notices.append(Notice(self._job_id, "progress", job.progress, self.cursor))
        return notices

    def position(self) -> Hashable:
        """As `Watch.position`."""
        cursor = self.cursor if self._options.with_log else replace(self.cursor, log_offset=0)
        return self._job_id, cursor, json.dumps(self._progress, sort_keys=True)

    def skip(self, db: Database) -> None:
        """Go to the end of what there is."""
        while changes := requests.events(db, self._job_id, after=self.cursor.event):
            self.cursor = replace(self.cursor, event=changes[-1].id)
        names = self._sample_names()
        self.cursor = replace(
            self.cursor,
            metrics_offset=_size(self._run_dir / "metrics.jsonl"),
            log_offset=_size(self._run_dir / "log.txt"),
            sample=names[-1] if names else "",
        )

    def _changes(self, db: Database) -> Iterator[Notice]:
        for event in requests.events(db, self._job_id, after=self.cursor.event, limit=_EVENTS):
            self.cursor = replace(self.cursor, event=event.id)
            yield Notice(self._job_id, "change", event, self.cursor)

    def _metrics(self) -> Iterator[Notice]:
        offset = self.cursor.metrics_offset
        lines, start = _new_lines(self._run_dir / "metrics.jsonl", offset, _METRICS_BYTES)
        for line in lines:
            start += len(line)
            self.cursor = replace(self.cursor, metrics_offset=start)
            values = _parsed(line)
            if values is not None:
                yield Notice(self._job_id, "metrics", values, self.cursor)

    def _log(self) -> Iterator[Notice]:
        lines, start = _new_lines(self._run_dir / "log.txt", self.cursor.log_offset, _LOG_BYTES)
        text = b"".join(lines)
        if text:
            self.cursor = replace(self.cursor, log_offset=start + len(text))
            yield Notice(self._job_id, "log", text.decode(errors="replace"), self.cursor)

    def _samples(self) -> Iterator[Notice]:
        for name in [name for name in self._sample_names() if name > self.cursor.sample][:_SAMPLES]:
            data = _picture(self._run_dir / "samples" / name)
            if data is None:  # not written whole yet
                return
            step = int(_SAMPLE_NAME.match(name)[1])  # type: ignore[index]
            sent = data if self._options.with_samples and len(data) <= MAX_SAMPLE_BYTES else b""
            self.cursor = replace(self.cursor, sample=name)
            yield Notice(self._job_id, "sample", SampleNotice(step, name, sent), self.cursor)

    def _sample_names(self) -> list[str]:
        try:
            return sorted(path.name for path in (self._run_dir / "samples").iterdir() if _is_sample(path))
        except OSError:
            return []


def _is_sample(path: Path) -> bool:
    return bool(_SAMPLE_NAME.match(path.name)) and path.is_file() and not path.is_symlink()


def _picture(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if data.endswith(_PNG_END) else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _new_lines(path: Path, offset: int, limit: int) -> tuple[list[bytes], int]:
    """Whole lines after `offset`, and where they start; a file that was cut is followed from its end."""
    start = min(max(offset, 0), _size(path))
    try:
        with path.open("rb") as file:
            file.seek(start)
            block = file.read(limit)
    except OSError:
        return [], start
    whole = block[: block.rfind(b"\n") + 1]
    if not whole and len(block) == limit:  # one line longer than the limit: pass it on in pieces
        whole = block
    return whole.splitlines(keepends=True), start


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None

"""One poller for all watchers: what it costs follows the jobs that are watched, not those who watch them.

Watchers of a job who have seen the same and want the same are one group, and a group looks once for all its members.
Who comes later catches up in a group of its own and joins the others where it has seen what they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from distill_core.errors import DistilleryError
from distill_service.jobs.database import Database
from distill_service.jobs.watch import Cursor, Notice, Options, Watch

LOOK_S = 0.3  # between two looks at a job that has nothing new
_BACKLOG = 16  # looks that a slow reader may be behind before it is left to read on by itself
_log = structlog.get_logger("distillery.jobs")
Batch = Sequence[Notice]


@dataclass(eq=False)
class _Watcher:
    """One reader. Its log offset is its own, where it does not read the log: the others' may differ."""

    options: Options
    batches: asyncio.Queue[Batch | DistilleryError | None] = field(default_factory=asyncio.Queue)
    resume: Mapping[str, Cursor] | None = None  # given: its group went on without it from there

    def give(self, batch: Batch, group: _Group) -> bool:
        """Hand on what a look found. False: too much of it is unread, the reader must come back."""
        self.batches.put_nowait(batch)
        if self.batches.qsize() < _BACKLOG:
            return True
        self.resume = {job: self._with_own_log(job, c) for job, c in group.watch.cursors().items()}
        return False

    def own(self, notice: Notice) -> Notice:
        """The notice with this reader's cursor."""
        return replace(notice, cursor=self._with_own_log(notice.job_id, notice.cursor))

    def _with_own_log(self, job_id: str, cursor: Cursor) -> Cursor:
        if self.options.with_log:
            return cursor
        return replace(cursor, log_offset=self.options.cursors.get(job_id, Cursor()).log_offset)


@dataclass(eq=False)
class _Group:
    """Watchers who get the same. `due`: when it looks next."""

    watch: Watch
    members: list[_Watcher]
    due: float = 0.0

    def key(self) -> Hashable:
        return self.watch.job_id, self.watch.position()


class Hub:
    """Follows jobs for any number of readers. Use it in one event loop, and `close` it there."""

    def __init__(self, db: Database, runs: Path, *, look_s: float = LOOK_S) -> None:
        self._db, self._runs, self._look_s = db, runs, look_s
        self._groups: list[_Group] = []
        self._changed = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self.looks = 0  # so far

    @property
    def groups(self) -> int:
        """Number of looks that a round takes now."""
        return len(self._groups)

    async def follow(self, job_id: str, options: Options) -> AsyncGenerator[Notice, None]:
        """All that happens to a job, or to a pipeline and its stages, until it ends.

        Raises:
            NotFound: no such job. Unavailable: the job table is gone; go on later from the last cursors.
        """
        watcher = self._join(job_id, options)
        try:
            while (batch := await watcher.batches.get()) is not None:
                if isinstance(batch, DistilleryError):
                    raise batch
                for notice in batch:
                    yield watcher.own(notice)
                if watcher.resume is not None and watcher.batches.empty():
                    watcher = self._join(job_id, replace(options, cursors=watcher.resume))
        finally:
            self._leave(watcher)

    def close(self) -> None:
        """Stop polling."""
        if self._poller is not None:
            self._poller.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _join(self, job_id: str, options: Options) -> _Watcher:
        watcher = _Watcher(options)
        for group in self._groups:  # which others came for at this moment
            if group.due == 0.0 and group.watch.job_id == job_id and group.watch.options == options:
                group.members.append(watcher)
                break
        else:
            self._groups.append(_Group(Watch(self._db, self._runs, job_id, options), [watcher]))
        self._changed.set()
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        return watcher

    def _leave(self, watcher: _Watcher) -> None:
        for group in self._groups:
            if watcher in group.members:
                group.members.remove(watcher)
        self._groups = [group for group in self._groups if group.members]

    async def _poll(self) -> None:
        """Look at what is due, as long as anybody watches; a long round is followed by as long a pause."""
        while self._groups:
            started = time.monotonic()
            for group in [group for group in self._groups if group.due <= started]:
                await self._look(group)
            self._merge()
            now = time.monotonic()
            pause = min((group.due for group in self._groups), default=now) - now
            await self._wait(max(pause, now - started, 0.0))

    async def _wait(self, seconds: float) -> None:
        self._changed.clear()
        if any(group.due == 0.0 for group in self._groups):
            seconds = 0.0
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    async def _look(self, group: _Group) -> None:
        if not group.members:
            return
        self.looks += 1
        group.due = time.monotonic()  # nobody joins it unseen from now on
        try:
            batch = await _in(self._thread, group.watch.look)
        except DistilleryError as error:
            self._end(group, error)
            return
        except Exception:
            _log.exception("watch failed")
            self._end(group, DistilleryError("internal error while following the job; watch it again"))
            return
        if batch:
            group.members = [watcher for watcher in group.members if watcher.give(batch, group)]
        if group.watch.ended:
            self._end(group, None)
        group.due = time.monotonic() + (0.0 if batch else self._look_s)

    def _end(self, group: _Group, last: DistilleryError | None) -> None:
        for watcher in group.members:
            watcher.batches.put_nowait(last)
        group.members = []

    def _merge(self) -> None:
        """Make one group of those who have seen the same, and forget those whom nobody reads."""
        first: dict[Hashable, _Group] = {}
        for group in self._groups:
            if not group.members:
                continue
            kept = first.setdefault(group.key() if group.due else id(group), group)
            if kept is not group:
                kept.members += group.members
        self._groups = list(first.values())


async def _in(pool: ThreadPoolExecutor, call: Callable[[], Batch]) -> Batch:
    return await asyncio.get_running_loop().run_in_executor(pool, call)

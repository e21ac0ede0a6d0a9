"""Dynamic batching for one model: while the device works, the next batch forms by itself.

The unit is one image, or one tile of a view. Those with equal keys (steps, guidance) and of one partition (the expert
that makes them) may share a batch, whoever asked for them, as long as it costs no more than `max_cost`. Each of the
model's threads takes its next batch itself the moment it is free, so that a busy event loop never keeps the device
waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from distill_core.errors import DistilleryError, Overloaded

Cost = Callable[[Any, Any], float]  # what a payload with this key costs, in any unit
Partition = Callable[[Any], Hashable]  # of a payload: batches never mix two of them
Run = Callable[[Hashable, list[Any]], Sequence[Any]]  # (key, payloads) -> results; called in a model thread
BULK_EVERY = 8  # at least one batch of so many starts with bulk work, if there is any
EMA_SHARE = 0.2
STARTING_S = 0.0005  # what a thread needs the interpreter for before its next batch runs
MARGIN = 2.0  # times the estimate: what would end just in time is, under load, answered too late


class Expired(DistilleryError):
    """The caller's deadline passed, or would pass, before a device was free."""

    grpc_status = "DEADLINE_EXCEEDED"


class Observer(Protocol):
    """Observer of what the batcher does."""

    def origin(self) -> Any:
        """Origin of the images now queued, kept until their batch ran, e.g. a span; None: nothing."""

    def batch(self, images: int, reason: str, waits: list[float], seconds: float, origins: list[Any]) -> None:
        """A batch ran; `reason` is full, idle or delay, `waits` how long each image was queued."""

    def queue(self, images: int) -> None:
        """The queue's length changed. Also called in the model's threads."""

    def rejected(self, reason: str) -> None:
        """Work was refused or dropped: queue, client_share, deadline."""


@dataclass(eq=False, slots=True)
class _Item:
    key: Hashable
    group: Hashable  # key and partition: what a batch has in common
    payload: Any
    cost: float
    client: str
    deadline: float | None  # event loop time
    queued_at: float
    future: asyncio.Future[Any]
    origin: Any


@dataclass
class _Line:
    """One priority class: per client, per group, first in first out; clients take turns."""

    clients: OrderedDict[str, dict[Hashable, deque[_Item]]] = field(default_factory=OrderedDict)

    def add(self, item: _Item) -> None:
        self.clients.setdefault(item.client, {}).setdefault(item.group, deque()).append(item)

    def remove(self, item: _Item) -> bool:
        groups = self.clients.get(item.client, {})
        if item not in groups.get(item.group, ()):
            return False
        groups[item.group].remove(item)
        if not groups[item.group]:
            del groups[item.group]
        if not groups:
            del self.clients[item.client]
        return True

    def first(self) -> _Item | None:
        """The oldest image of the client whose turn it is."""
        for groups in self.clients.values():
            return min((items[0] for items in groups.values()), key=lambda item: item.queued_at)
        return None

    def matching(self, group: Hashable, fits: Callable[[_Item], bool]) -> Iterator[_Item]:
        """Take images of `group` out of the line, one a client, round and round, until one does not fit."""
        while waiting := [client for client, groups in self.clients.items() if group in groups]:
            for client in waiting:
                item = self.clients[client][group][0]
                if not fits(item):
                    return
                self.clients.move_to_end(client)
                self.remove(item)
                yield item


@dataclass(eq=False, slots=True)
class _Batch:
    """Items that a thread runs together."""

    items: list[_Item]
    cost: float
    delayed: bool
    started: float  # event loop time
    since: float  # when it could have started at the earliest: what lies between counts as its time, too


class Batcher:
    """Queues images of one model and runs them in batches on `instances` threads. Made and used on an event loop."""

    def __init__(
        self,
        run: Run,
        observer: Observer,
        *,
        max_batch: int,
        max_queue: int,
        instances: int = 1,
        max_delay_s: float = 0.0,
        max_cost: float = math.inf,
        cost: Cost = lambda _key, _payload: 1.0,
        partition: Partition = lambda _payload: None,
        seconds_per_cost: float = 0.0,
    ) -> None:
        self._run, self._observer = run, observer
        self.max_batch, self.max_queue, self.max_delay_s = max_batch, max_queue, max_delay_s
        self.max_cost = max_cost  # of a batch of several
        self.queued = 0
        self.seconds_per_cost = seconds_per_cost  # a first guess; each batch corrects it
        self._cost, self._partition = cost, partition
        self._loop = asyncio.get_running_loop()
        self._changed = (
            threading.Condition()
        )  # guards all that follows, and the queue's length and speed above
        self._queued_cost = 0.0
        self._running: set[_Batch] = set()
        self._ended: deque[tuple[_Batch, Sequence[Any], float]] = deque()  # with their seconds
        self._lines = {False: _Line(), True: _Line()}  # by `bulk`
        self._per_client: dict[str, int] = {}
        self._batches = 0
        self._closed = False
        self._instances = instances
        for number in range(instances):
            threading.Thread(target=self._serve, name=f"model-{number}", daemon=True).start()

    def submit(
        self,
        key: Hashable,
        payloads: Sequence[Any],
        *,
        client: str = "",
        deadline: float | None = None,
        bulk: bool = False,
    ) -> list[asyncio.Future[Any]]:
        """Queue all payloads, or none; one future each. Cancelling a future takes its image out of the queue.

        Raises:
            Overloaded: the queue, or this client's share of it, is full. Expired: `deadline` cannot be met.
        """
        now, origin = self._loop.time(), self._observer.origin()
        with self._changed:
            self._admit(len(payloads), client, deadline, now, sum(self._cost(key, one) for one in payloads))
            items = []
            for payload in payloads:
                group, cost = (key, self._partition(payload)), self._cost(key, payload)
                future = self._loop.create_future()
                item = _Item(key, group, payload, cost, client, deadline, now, future, origin)
                future.add_done_callback(partial(self._forget, item, bulk))
                self._lines[bulk].add(item)
                self._count(item, 1)
                items.append(item)
            self._changed.notify(len(items))
        self._observer.queue(self.queued)
        return [item.future for item in items]

    @property
    def busy(self) -> bool:
        """Whether what is queued now has to wait; between two batches a thread runs none, and a queue is left."""
        return len(self._running) >= self._instances or self.queued > self.max_batch

    def wait_estimate(self) -> float:
        """Seconds until what runs and what waits now would be done."""
        with self._changed:
            return self._wait_estimate()

    def too_late(self, seconds_left: float) -> Expired | None:
        """Refusal of a caller who has so long left; None if it may be tried."""
        wait = self.wait_estimate()
        return self._expired(wait) if MARGIN * wait > seconds_left else None

    async def close(self) -> None:
        """Stop; whoever still waits is cancelled."""
        with self._changed:
            self._closed = True
            left = [item for batch in self._running for item in batch.items]
            for line in self._lines.values():
                while item := line.first():
                    line.remove(item)
                    left.append(item)
            self._changed.notify_all()
        for item in left:
            item.future.cancel()

    def _wait_estimate(self) -> float:
        now = self._loop.time()
        waiting = self._queued_cost * self.seconds_per_cost
        for batch in self._running:
            elapsed = now - batch.started
            left = batch.cost * self.seconds_per_cost - elapsed
            waiting += left if left > 0 else elapsed  # overdue: as long again, for want of anything better
        return waiting / self._instances

    def _admit(self, images: int, client: str, deadline: float | None, now: float, cost: float) -> None:
        wait = self._wait_estimate()
        others = self.queued - self._per_client.get(client, 0)
        if self.queued + images > self.max_queue:
            self._refuse("queue", f"{self.queued} of {self.max_queue} images are queued", wait)
        if others and self._per_client.get(client, 0) + images > self.max_queue // 2:
            self._refuse(
                "client_share", f"this client holds half of the queue of {self.max_queue} images", wait
            )
        own = cost * self.seconds_per_cost / self._instances
        needed = MARGIN * (wait + own) if wait else 0.0  # idle: tried, so that a wrong estimate is put right
        if deadline is not None and now + needed > deadline:
            self._observer.rejected("deadline")
            raise self._expired(wait + own)

    def _expired(self, wait: float) -> Expired:
        return Expired(f"the queue takes about {wait:.2g} s, longer than the call's deadline allows")

    def _refuse(self, reason: str, why: str, wait: float) -> None:
        self._observer.rejected(reason)
        retry = max(wait, 0.05)
        raise Overloaded(f"the model is busy: {why}; try again in {retry:.2g} s", retry_after_s=retry)

    def _count(self, item: _Item, change: int) -> None:
        self.queued += change
        self._queued_cost = self._queued_cost + change * item.cost if self.queued else 0.0
        self._per_client[item.client] = self._per_client.get(item.client, 0) + change
        if not self._per_client[item.client]:
            del self._per_client[item.client]

    def _forget(self, item: _Item, bulk: bool, future: asyncio.Future[Any]) -> None:
        """Take a cancelled image out of the queue, if it is still there."""
        if not future.cancelled():
            return
        with self._changed:
            if self._lines[bulk].remove(item):
                self._count(item, -1)
        self._observer.queue(self.queued)

    # -- in the model's threads -----------------------------------------------------------------------------

    def _serve(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop ended, and with it everybody who waits
            free, ended = self._loop.time(), False
            while batch := self._next(free, ended):
                answers = self._answers(batch.items)
                free, ended = self._loop.time(), True
                with self._changed:
                    self._running.discard(batch)
                    self._learn((free - batch.since) / batch.cost)
                self._ended.append((batch, answers, free - batch.started))

    def _next(self, free: float, ended: bool) -> _Batch | None:
        """The next batch, when there is one, for a thread that is free since then; None at the end.

        If the thread's last one `ended`, its answers are handed out now, or once the next runs: while the event loop
        packs pictures, this thread would have to wait for the interpreter.
        """
        batch: _Batch | None = None
        with self._changed:
            while not (self._closed or batch):
                if ended and (self.max_delay_s > 0 or not self.queued):
                    self._loop.call_soon_threadsafe(self._deliver)
                    ended = False
                self._changed.wait_for(lambda: self._closed or self.queued)
                delayed = self.max_delay_s > 0 and self.queued < self.max_batch
                if delayed:
                    self._changed.wait_for(self._is_full, self.max_delay_s)
                items, late = self._take()
                if late:
                    self._loop.call_soon_threadsafe(self._expire, late)
                if items:
                    cost = sum(item.cost for item in items)
                    started, queued_at = self._loop.time(), min(item.queued_at for item in items)
                    since = started if delayed else max(free, queued_at)
                    batch = _Batch(items, cost, delayed, started, since)
                    self._running.add(batch)
                    self._observer.queue(self.queued)
        if ended:
            self._loop.call_soon_threadsafe(self._loop.call_later, STARTING_S, self._deliver)
        return batch

    def _is_full(self) -> bool:
        return self._closed or self.queued >= self.max_batch

    def _take(self) -> tuple[list[_Item], list[_Item]]:
        """The next batch, images that are still wanted, all of one group; and those that are too late."""
        self._batches += 1
        bulk_first = self._batches % BULK_EVERY == 0
        lines = [self._lines[bulk_first], self._lines[not bulk_first]]
        batch: list[_Item] = []
        late: list[_Item] = []
        first = lines[0].first() or lines[1].first()
        if first is None:
            return batch, late
        now = self._loop.time()

        idle = self._instances - len(self._running)  # this thread among them
        most = min(self.max_batch, math.ceil(self.queued / idle))  # a share for each

        def fits(item: _Item) -> bool:
            return not batch or item.cost + sum(other.cost for other in batch) <= self.max_cost

        for line in lines:
            matching = line.matching(first.group, fits)
            while len(batch) < most and (item := next(matching, None)):
                self._count(item, -1)
                # While others wait, also what would end too late: they are answered in its place.
                ahead = item.cost * self.seconds_per_cost if self.queued else 0.0
                if item.deadline is not None and item.deadline <= now + ahead:
                    late.append(item)
                elif not item.future.done():
                    batch.append(item)
        return batch, late

    def _answers(self, items: list[_Item]) -> Sequence[Any]:
        """A result or an exception for each image."""
        try:
            answers = self._run(items[0].key, [item.payload for item in items])
            return [answer for _, answer in zip(items, answers, strict=True)]
        except BaseException as error:  # also a SystemExit: the thread has to live on
            if len(items) == 1:
                return [error]
            return [self._answers([item])[0] for item in items]  # one bad image must not fail its neighbours

    def _learn(self, seconds: float) -> None:
        known = self.seconds_per_cost
        self.seconds_per_cost = known + EMA_SHARE * (seconds - known) if known else seconds

    # -- on the event loop again ----------------------------------------------------------------------------

    def _deliver(self) -> None:
        while self._ended:
            batch, answers, seconds = self._ended.popleft()
            items = batch.items
            reason = "full" if len(items) == self.max_batch else "delay" if batch.delayed else "idle"
            waits = [batch.started - item.queued_at for item in items]
            self._observer.batch(len(items), reason, waits, seconds, [item.origin for item in items])
            self._hand_out(deque(zip(items, answers, strict=True)))

    def _hand_out(self, left: deque[tuple[_Item, Any]]) -> None:
        """One answer a turn of the event loop: a new call does not wait until a whole batch is packed and sent."""
        item, answer = left.popleft()
        if left:
            self._loop.call_soon(self._hand_out, left)
        if item.future.done():
            return
        if isinstance(answer, BaseException):
            item.future.set_exception(answer)
        else:
            item.future.set_result(answer)

    def _expire(self, late: list[_Item]) -> None:
        for item in late:
            if not item.future.done():
                self._observer.rejected("deadline")
                item.future.set_exception(Expired("the call's deadline passed while it was queued"))


def drop(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Take what is not done out of the queue; errors that nobody awaits are no news."""
    for future in futures:
        if not future.cancel() and not future.cancelled():
            future.exception()

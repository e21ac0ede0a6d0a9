"""Dynamic batching for one model: while the device works, the next batch forms by itself. asyncio only.

The unit is one image, or one tile of a view. Those with equal keys (steps, guidance) and of one kind (the expert that
makes them) may share a batch, whoever asked for them, as long as it costs no more than `max_cost`.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from distill_core.errors import DistilleryError, Overloaded

Cost = Callable[[Any, Any], float]  # what a payload with this key costs, in any unit
Kind = Callable[[Any], Hashable]  # what sets a payload apart from others with its key
Run = Callable[[Hashable, list[Any]], Sequence[Any]]  # (key, payloads) -> results; called in a model thread
BULK_EVERY = 8  # at least one batch of so many starts with bulk work, if there is any
EMA_SHARE = 0.2


class Expired(DistilleryError):
    """The caller's deadline passed, or would pass, before a device was free."""

    grpc_status = "DEADLINE_EXCEEDED"


class Observer(Protocol):
    """Who is told what the batcher does."""

    def batch(self, images: int, reason: str, waits: list[float], seconds: float) -> None:
        """A batch ran; `reason` is full, idle or delay, `waits` how long each image was queued."""

    def queue(self, images: int) -> None:
        """The queue's length changed."""

    def rejected(self, reason: str) -> None:
        """Work was refused or dropped: queue, client_share, deadline."""


@dataclass(eq=False)
class _Item:
    key: Hashable
    group: Hashable  # key and kind: what a batch has in common
    payload: Any
    cost: float
    client: str
    deadline: float | None  # event loop time
    queued_at: float
    future: asyncio.Future[Any]


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


class Batcher:
    """Queues images of one model and runs them in batches on `instances` threads."""

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
        kind: Kind = lambda _payload: None,
        seconds_per_cost: float = 0.0,
    ) -> None:
        self._run, self._observer = run, observer
        self.max_batch, self.max_queue, self.max_delay_s = max_batch, max_queue, max_delay_s
        self.max_cost = max_cost  # of a batch of several
        self.queued = 0
        self.seconds_per_cost = seconds_per_cost  # a first guess; each batch corrects it
        self._cost, self._kind = cost, kind
        self._queued_cost = 0.0
        self._running: dict[int, tuple[float, float]] = {}  # by batch number: when it started, what it costs
        self._lines = {False: _Line(), True: _Line()}  # by `bulk`
        self._per_client: dict[str, int] = {}
        self._batches = 0
        self._work = asyncio.Event()
        self._executor = ThreadPoolExecutor(instances, thread_name_prefix="model")
        self._instances = instances
        self._workers = [asyncio.create_task(self._serve()) for _ in range(instances)]

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
        loop = asyncio.get_running_loop()
        self._admit(len(payloads), client, deadline, loop.time())
        items = [
            _Item(
                key,
                (key, self._kind(payload)),
                payload,
                self._cost(key, payload),
                client,
                deadline,
                loop.time(),
                loop.create_future(),
            )
            for payload in payloads
        ]
        for item in items:
            self._lines[bulk].add(item)
            item.future.add_done_callback(partial(self._forget, item, bulk))
            self._count(item, 1)
        self._work.set()
        return [item.future for item in items]

    def wait_estimate(self) -> float:
        """Seconds until what runs and what waits now would be done."""
        now = asyncio.get_running_loop().time()
        waiting = self._queued_cost * self.seconds_per_cost
        for started, cost in self._running.values():
            elapsed = now - started
            left = cost * self.seconds_per_cost - elapsed
            waiting += left if left > 0 else elapsed  # overdue: as long again, for want of anything better
        return waiting / self._instances

    async def close(self) -> None:
        """Stop; whoever still waits is cancelled."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for line in self._lines.values():
            while item := line.first():
                item.future.cancel()
                line.remove(item)
        self._executor.shutdown(wait=False)

    def _admit(self, images: int, client: str, deadline: float | None, now: float) -> None:
        wait = self.wait_estimate()
        others = self.queued - self._per_client.get(client, 0)
        if self.queued + images > self.max_queue:
            self._refuse("queue", f"{self.queued} of {self.max_queue} images are queued", wait)
        if others and self._per_client.get(client, 0) + images > self.max_queue // 2:
            self._refuse(
                "client_share", f"this client holds half of the queue of {self.max_queue} images", wait
            )
        if deadline is not None and now + wait > deadline:
            self._observer.rejected("deadline")
            raise Expired(f"the queue takes about {wait:.1f} s, longer than the call's deadline allows")

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
        self._observer.queue(self.queued)

    def _forget(self, item: _Item, bulk: bool, _future: asyncio.Future[Any]) -> None:
        if self._lines[bulk].remove(item):  # cancelled while it waited
            self._count(item, -1)

    def _take(self) -> list[_Item]:
        """The next batch: images that are still wanted, all of one group."""
        self._batches += 1
        bulk_first = self._batches % BULK_EVERY == 0
        lines = [self._lines[bulk_first], self._lines[not bulk_first]]
        batch: list[_Item] = []
        first = lines[0].first() or lines[1].first()
        if first is None:
            return batch
        now = asyncio.get_running_loop().time()

        def fits(item: _Item) -> bool:
            return not batch or item.cost + sum(other.cost for other in batch) <= self.max_cost

        for line in lines:
            matching = line.matching(first.group, fits)
            while len(batch) < self.max_batch and (item := next(matching, None)):
                self._count(item, -1)
                if not self._is_late(item, now):
                    batch.append(item)
        return batch

    def _is_late(self, item: _Item, now: float) -> bool:
        if item.deadline is not None and item.deadline <= now and not item.future.done():
            self._observer.rejected("deadline")
            item.future.set_exception(Expired("the call's deadline passed while it was queued"))
        return item.future.done()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            delayed = self.max_delay_s > 0 and self.queued < self.max_batch
            if delayed:
                await asyncio.sleep(self.max_delay_s)
            batch = self._take()
            if not self.queued:
                self._work.clear()
            if not batch:
                continue
            started, number, cost = loop.time(), self._batches, sum(item.cost for item in batch)
            self._running[number] = started, cost
            try:
                await self._execute(batch)
            finally:
                del self._running[number]
                for item in batch:
                    item.future.cancel()  # no effect on an answered one: only `close` leaves others
            seconds = loop.time() - started
            self._learn(seconds / cost)
            reason = "full" if len(batch) == self.max_batch else "delay" if delayed else "idle"
            self._observer.batch(len(batch), reason, [started - item.queued_at for item in batch], seconds)

    def _learn(self, seconds: float) -> None:
        known = self.seconds_per_cost
        self.seconds_per_cost = known + EMA_SHARE * (seconds - known) if known else seconds

    async def _execute(self, batch: list[_Item]) -> None:
        loop = asyncio.get_running_loop()
        payloads = [item.payload for item in batch]
        try:
            results = await loop.run_in_executor(self._executor, self._run, batch[0].key, payloads)
        except Exception as error:
            if len(batch) > 1:  # one bad image must not fail its neighbours
                for item in batch:
                    if not item.future.done():
                        await self._execute([item])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        for item, result in zip(batch, results, strict=True):
            if not item.future.done():
                item.future.set_result(result)

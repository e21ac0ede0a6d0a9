"""Prefetch: values of a pure function, made ahead by a few threads and taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """`make(number)` for numbers in order, each begun before it is taken; a context that ends its threads.

    Threads do, since what takes the time (decoders, resizing, arithmetic of tensors) releases the interpreter's lock.
    Only `take` begins work, at most `ahead` numbers beyond its own: no thread ever waits for room in a queue, so that
    leaving the context has nobody to wake. What `make` raises is raised by the `take` of that number, and by no other.
    """

    def __init__(self, make: Callable[[int], T], *, ahead: int, stop: int) -> None:
        self._make, self._ahead, self._stop = make, ahead, stop  # numbers from `stop` on are not made ahead
        self._pool = ThreadPoolExecutor(ahead, thread_name_prefix="prefetch")
        self._begun: deque[tuple[int, Future[T]]] = deque()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._begun.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, number: int) -> T:
        """The value of `number`; cheap when it is the one after the last."""
        while self._begun and self._begun[0][0] != number:
            self._begun.popleft()[1].cancel()
        following = self._begun[-1][0] + 1 if self._begun else number
        last = max(number, min(number + self._ahead, self._stop - 1))
        for later in range(following, last + 1):
            self._begun.append((later, self._pool.submit(self._make, later)))
        return self._begun.popleft()[1].result()

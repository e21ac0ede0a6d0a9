"""As many calls at once as the server takes: what would be one too many is ended here, and not sent.

Refusing a small call costs a server nearly what answering it does: one that is asked for several times what it can do
would do less and less. So a client that was refused keeps fewer calls in flight, and more again while they are
answered, as TCP does with its packets (additive increase, multiplicative decrease: Chiu and Jain 1989).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from distill_core.errors import Overloaded
from distill_service.status import PUSHBACK_KEY

CUT = 0.9  # of the calls in flight stay, when one more is refused
GROWTH = 0.1  # calls, when all that are in flight were answered
FORGET_S = 10.0  # without a refusal: then no limit is known any more
RETRY_S = 0.05
MOST = 1000  # limits that are kept: names of models may come from anybody


class Limits:
    """Number of calls at once that a server takes, by model and by how long they have: the hurried are refused sooner.

    Safe to use from several threads.
    """

    def __init__(self, address: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._address, self._clock = address, clock
        self._lock = threading.Lock()
        self._limits: dict[tuple[str, int | None], _Limit] = {}

    @contextmanager
    def call(self, model: str, timeout_s: float | None) -> Iterator[None]:
        """Around one call that has so long; None: for ever.

        Raises:
            Overloaded: it is not to be sent.
        """
        began = self._clock()
        with self._lock:
            limit = self._limit(model, timeout_s)
            if not limit.admits(began):
                raise Overloaded(
                    f"not sent: {limit.in_flight} calls for {model!r} are in flight, and {self._address} refused "
                    "more; try again when one of them has ended",
                    retry_after_s=RETRY_S,
                )
            limit.in_flight += 1
            at_once = limit.in_flight
        try:
            yield
        except grpc.RpcError as error:
            if _is_refusal(error):
                with self._lock:
                    limit.cut(began, self._clock())
            raise
        else:
            with self._lock:
                limit.grow(at_once)
        finally:
            with self._lock:
                limit.in_flight -= 1

    def _limit(self, model: str, timeout_s: float | None) -> _Limit:
        key = model, None if timeout_s is None else math.frexp(timeout_s)[1]
        if key not in self._limits and len(self._limits) >= MOST:
            self._limits.clear()
        return self._limits.setdefault(key, _Limit())


def _is_refusal(error: grpc.RpcError) -> bool:
    """For want of time or room; a message that is too large is refused without a word on when to come again."""
    full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    told = full and PUSHBACK_KEY in dict(error.trailing_metadata() or ())
    return told or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


class _Limit:
    def __init__(self) -> None:
        self.in_flight, self._limit, self._cut_at = 0, math.inf, -math.inf
        self._answered = 0  # so many at once since the last cut

    def admits(self, now: float) -> bool:
        if now - self._cut_at > FORGET_S:
            self._limit = math.inf
        return self.in_flight + 1 <= self._limit

    def grow(self, at_once: int) -> None:
        """After an answer to the last of so many, if there were as many calls as may be."""
        self._answered = max(self._answered, at_once)
        if self.in_flight + 1 > self._limit:
            self._limit += GROWTH / self._limit

    def cut(self, began: float, now: float) -> None:
        """After a refusal; calls that were sent before the last cut cannot know of it.

        What was answered meanwhile can be sent again: a call that is refused for what it asks holds up no other.
        """
        if began >= self._cut_at:
            fewer = CUT * min(self._limit, self.in_flight - 1)
            self._limit, self._cut_at, self._answered = max(1.0, self._answered, fewer), now, 0

"""How many calls at once a client sends to a server that refuses some."""

from __future__ import annotations

import heapq
from contextlib import ExitStack

import grpc
import pytest

from distill_core.errors import Overloaded
from distillery_sampler.client.limits import FORGET_S, MOST, Limits

TICK_S = 0.001
FULL, LATE, BROKEN = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
)


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, *, silent: bool = False) -> None:
        super().__init__()
        self._code, self._silent = code, silent

    def code(self) -> grpc.StatusCode:
        return self._code

    def trailing_metadata(self):
        return () if self._silent else (("grpc-retry-pushback-ms", "50"),)


class Server:
    """Answers one call after the other, `seconds` each; refuses at once while `room` of them are there."""

    def __init__(self, seconds: float, room: int) -> None:
        self.seconds, self.room, self.now = seconds, room, 0.0
        self.limits = Limits("here:1", clock=lambda: self.now)
        self.answered = self.refused = self.unsent = 0
        self._calls: list[tuple[float, int, ExitStack]] = []
        self._free = 0.0

    def offered(self, rate: float, seconds: float, timeout_s: float | None = 1.0) -> None:
        """So many calls a second; what becomes of them is counted anew."""
        self.answered = self.refused = self.unsent = 0
        due = 0.0
        for tick in range(round(seconds / TICK_S)):
            self.now += TICK_S
            while self._calls and self._calls[0][0] <= self.now:
                heapq.heappop(self._calls)[2].close()
                self.answered += 1
            due += rate * TICK_S
            while due >= 1:
                due -= 1
                self._one(tick, timeout_s)

    def _one(self, tick: int, timeout_s: float | None) -> None:
        call = ExitStack()
        try:
            call.enter_context(self.limits.call("digits", timeout_s))
        except Overloaded:
            self.unsent += 1
            return
        if len(self._calls) >= self.room:
            self.refused += 1
            with pytest.raises(Failed), call:
                raise Failed(FULL)
            return
        self._free = max(self._free, self.now) + self.seconds
        heapq.heappush(self._calls, (self._free, tick, call))


@pytest.mark.parametrize("room", [1, 2, 45], ids="room for {}".format)
def test_an_overloaded_server_is_kept_busy_and_refuses_next_to_nothing(room):
    server = Server(seconds=0.01, room=room)
    server.offered(400, 2)
    server.offered(400, 20)
    assert (
        server.answered > 0.75 * 100 * 20
    )  # alone, a server with room for one call would be found free late
    assert server.refused < 0.06 * server.unsent  # all of them, without a limit
    assert server.answered + server.refused + server.unsent > 390 * 20


def test_without_a_refusal_there_is_no_limit():
    server = Server(seconds=1.0, room=10**6)
    server.offered(300, 3)
    assert (server.refused, server.unsent) == (0, 0)


def test_a_server_that_has_more_room_is_sent_more():
    server = Server(seconds=0.01, room=8)
    server.offered(400, 3)
    server.seconds, server.room = 0.001, 100
    server.offered(400, 5)
    server.offered(400, 5)
    assert server.unsent == 0


def test_after_a_while_without_refusals_nothing_is_held_back():
    server = Server(seconds=0.01, room=8)
    server.offered(400, 3)
    server.offered(0, FORGET_S + 1)
    server.room = 10**6
    server.offered(400, 1)
    assert server.unsent == 0


@pytest.mark.parametrize(
    ("error", "limits_it"),
    [
        (Failed(FULL), True),
        (Failed(LATE), True),
        (Failed(FULL, silent=True), False),  # a message that is too large
        (Failed(BROKEN), False),
    ],
)
def test_only_refusals_for_want_of_room_or_time_count(error, limits_it):
    limits = Limits("here:1", clock=lambda: 0.0)
    with ExitStack() as calls:
        for _ in range(10):
            calls.enter_context(limits.call("digits", 1.0))
        with pytest.raises(Failed), limits.call("digits", 1.0):
            raise error
        if limits_it:
            with pytest.raises(Overloaded, match="10 calls for 'digits' are in flight, and here:1 refused"):
                calls.enter_context(limits.call("digits", 1.0))
        calls.enter_context(limits.call("other", 1.0))  # has a queue of its own
        calls.enter_context(limits.call("digits", 60.0))  # is in less of a hurry
        calls.enter_context(limits.call("digits", None))
        if not limits_it:
            calls.enter_context(limits.call("digits", 1.0))


@pytest.mark.parametrize("error", [Failed(LATE), Failed(FULL), Failed(FULL, silent=True)])
def test_a_call_that_is_refused_for_what_it_asks_holds_up_no_other(error):
    limits = Limits("here:1", clock=lambda: 0.0)
    for _ in range(100):  # five calls at once are answered, then one asks for too much
        with ExitStack() as calls:
            for _ in range(5):
                calls.enter_context(limits.call("digits", 1.0))
        with pytest.raises(Failed), limits.call("digits", 1.0):
            raise error


def test_one_call_is_always_sent():
    limits = Limits("here:1", clock=lambda: 0.0)
    for _ in range(50):
        with pytest.raises(Failed), limits.call("digits", 1.0):
            raise Failed(FULL)


def test_names_from_anybody_fill_no_memory():
    limits = Limits("here:1")
    for number in range(3 * MOST):
        with limits.call(f"model-{number}", 1.0):
            pass
    assert len(limits._limits) <= MOST

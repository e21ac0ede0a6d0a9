"""A load generator in a process of its own: `python load.py CLIENT.py ADDRESS MODEL PATIENCE`.

It reads one JSON command a line from stdin and answers each with one JSON line. It also runs inside the environment
of another server, with that server's own client, hence it imports the standard library alone. CLIENT.py defines

    async def connect(address: str, model: str) -> Call

where `Call` is `await call(seed, labels, timeout_s) -> bytes`; it raises `Refused` for what the server would not
take, and `TimeoutError` for what came too late. Every call draws a seed of its own; its label is the seed's last digit.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import random
import selectors
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

Call = Callable[[int, list[int], float], Awaitable[bytes]]
TIMEOUT_S = 60.0  # of a call without a deadline
MAX_PENDING = 4000  # calls at once; what would be sent above it counts as failed


class Refused(Exception):
    """The server answered at once that it will not take this call."""


class Tally:
    """Outcome of the calls of one load; latencies in seconds since a call was due."""

    def __init__(self) -> None:
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.lag: list[float] = []  # how late this process sent
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def send(self, call: Call, seed: int, images: int, due: float, deadline_s: float | None) -> None:
        """One call, which was due at `due` and has until `deadline_s` later."""
        sent = time.perf_counter()
        self.lag.append(sent - due)
        timeout = TIMEOUT_S if deadline_s is None else max(deadline_s - (sent - due), 0.001)
        labels = [(seed + index) % 10 for index in range(images)]
        try:
            await call(seed, labels, timeout)
        except Refused:
            self.counts["refused"] += 1
            self.refused.append(time.perf_counter() - due)
        except TimeoutError:
            self.counts["late"] += 1
            self.accepted.append(time.perf_counter() - due)
        except Exception as error:
            self.counts["failed"] += 1
            self.errors[f"{type(error).__name__}: {error}"[:200]] += 1
        else:
            self.counts["ok"] += 1
            self.accepted.append(time.perf_counter() - due)

    def summary(self, seconds: float, cpu: float, images: int) -> dict[str, Any]:
        """Figures of the load; p50 and p99 are of all that the server accepted, also of what came too late."""
        accepted, refused, lag = sorted(self.accepted), sorted(self.refused), sorted(self.lag)
        counts = {name: self.counts[name] for name in ("ok", "refused", "late", "failed")}
        return {
            **counts,
            "seconds": seconds,
            "images_per_s": images * self.counts["ok"] / seconds,
            "p50_ms": quantile(accepted, 0.5),
            "p99_ms": quantile(accepted, 0.99),
            "refusal_p50_ms": quantile(refused, 0.5),
            "refusal_p99_ms": quantile(refused, 0.99),
            "lag_p99_ms": quantile(lag, 0.99),
            "client_cores": cpu / seconds,
            "errors": dict(self.errors.most_common(3)),
        }


def quantile(ordered: list[float], share: float) -> float | None:
    """The value in milliseconds below which a `share` of the ordered seconds lie; None of nothing."""
    return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


async def closed(
    call: Call, *, concurrency: int, seconds: float, images: int = 1, first_seed: int = 0
) -> dict[str, Any]:
    """`concurrency` callers, each of which sends its next call when the last one is answered."""
    tally, seeds = Tally(), iter(range(first_seed, sys.maxsize))
    began, cpu = time.perf_counter(), time.process_time()

    async def caller() -> None:
        while (now := time.perf_counter()) - began < seconds:
            await tally.send(call, next(seeds), images, now, None)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return tally.summary(time.perf_counter() - began, time.process_time() - cpu, images)


async def offered(
    call: Call,
    *,
    rate: float,
    seconds: float,
    deadline_s: float | None = None,
    images: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Calls at random moments (Poisson), `rate` a second on average, whether or not earlier ones were answered."""
    draw, due, moments = random.Random(seed), 0.0, []  # nosec B311: moments of calls, no secret
    while (due := due + draw.expovariate(rate)) < seconds:
        moments.append(due)
    tally = Tally()
    pending: set[asyncio.Task[None]] = set()
    began, cpu = time.perf_counter(), time.process_time()
    for number, moment in enumerate(moments):
        wait = began + moment - time.perf_counter()
        await asyncio.sleep(max(wait, 0))
        if len(pending) >= MAX_PENDING:
            tally.counts["failed"] += 1
            tally.errors[f"more than {MAX_PENDING} calls unanswered"] += 1
            continue
        task = asyncio.create_task(tally.send(call, number, images, began + moment, deadline_s))
        pending.add(task)
        task.add_done_callback(pending.discard)
    took = max(time.perf_counter() - began, seconds)
    answered = tally.counts["ok"]  # what the backlog brings afterwards is no throughput of this load
    await asyncio.gather(*pending)
    summary = tally.summary(took, time.process_time() - cpu, images)
    return {**summary, "offered": len(moments) * images / seconds, "images_per_s": images * answered / took}


async def settled(call: Call) -> dict[str, Any]:
    """Wait until the server answers again: it may still work on calls that nobody waits for."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        try:
            await call(0, [0], TIMEOUT_S)
            return {"settled": True}
        except Exception:
            await asyncio.sleep(0.1)
    return {"settled": False}


async def connected(path: str, address: str, model: str, patience_s: float) -> Call:
    """The client's call, once the server has answered one; it may load its model meanwhile."""
    spec = importlib.util.spec_from_file_location("client", path)
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    client.Refused = Refused  # type: ignore[attr-defined]
    until = time.monotonic() + patience_s
    while True:
        try:
            call: Call = await client.connect(address, model)
            await call(0, [0], 10.0)
            return call
        except Exception:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


async def serve(path: str, address: str, model: str, patience_s: str) -> None:
    """Answer commands until stdin ends."""
    call = await connected(path, address, model, float(patience_s))
    loop = asyncio.get_running_loop()
    kinds: dict[str, Callable[..., Awaitable[dict[str, Any]]]]
    kinds = {"closed": closed, "offered": offered, "settled": settled}
    say({"ready": True})
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        kind = command.pop("kind")
        if kind == "picture":
            answer = await call(command["seed"], command["labels"], TIMEOUT_S)
            say({"picture": base64.b64encode(answer).decode()})
        else:
            say(await kinds[kind](call, **command))


def say(value: dict[str, Any]) -> None:
    """One answer."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    # select() waits to the microsecond, epoll to the next millisecond, which would look like latency
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve(*sys.argv[1:5]))

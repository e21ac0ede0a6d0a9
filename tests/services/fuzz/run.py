"""`python -m tests.services.fuzz.run [CALLS]`: breaks a live sampler in every way we know, and says how it took it.

Prints kinds x statuses and the memory's curve; writes out/fuzz/sampler.json. The exit code is 1 if a call ended as it
must not, a right call in between was answered wrongly, the sampler is not SERVING, or its memory grew after a warm-up.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from distill_core.artifacts import ArtifactStore
from tests.services.fuzz import http2_kinds as http2
from tests.services.fuzz import message_kinds as messages
from tests.services.fuzz.message_kinds import Draw, Reference, Stubs, ended
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser, teacher_spec

CALLS, THREADS, CHUNK = 20_000, 6, 100
WARM_UP = 10_000  # calls before those: memory grows most in them
GROWTH = 0.05
RESTS, REST_S = 24, 2.0  # how often the memory is looked at, and for how long nothing is sent before
RIGHT = "right calls"
GONE = frozenset({"GOAWAY", "CLOSED", "LEFT", "RESET"})
BAD = frozenset({"INVALID_ARGUMENT"})
LATE = frozenset({"DEADLINE_EXCEEDED"})
OK = frozenset({"OK"})

# (how often, how it may end). What gRPC's own core answers is allowed as it is, as long as it answers.
HTTP2: dict[Callable[[int, Random], str], tuple[float, frozenset[str]]] = {
    http2.truncated: (3, BAD),
    http2.in_pieces: (2, OK),
    http2.trailing: (2, OK | BAD | {"INTERNAL"}),
    http2.garbage_message: (3, BAD),
    http2.bad_flag: (2, BAD | {"INTERNAL"}),
    http2.too_long: (0.5, frozenset({"RESOURCE_EXHAUSTED"})),
    http2.gzip_bomb: (0.05, frozenset({"RESOURCE_EXHAUSTED"})),
    http2.broken_gzip: (1, BAD | {"INTERNAL"}),
    http2.content_type: (1, OK | {"HTTP_415"}),
    http2.unknown_path: (2, frozenset({"UNIMPLEMENTED", "RESET"})),
    http2.verb: (0.3, frozenset({"RESET", "INTERNAL", "UNIMPLEMENTED", "HTTP_405"})),
    http2.odd_header: (2, OK | GONE | BAD | {"INTERNAL", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"}),
    http2.missing_header: (0.3, frozenset({"RESET", "INTERNAL", "UNIMPLEMENTED"})),
    http2.header_flood: (0.1, frozenset({"RESOURCE_EXHAUSTED"}) | GONE),
    http2.continuation_flood: (0.5, GONE),
    http2.half_closed: (3, BAD),
    http2.left_open: (2, LATE),
    http2.slow_body: (1, LATE),
    http2.reset: (3, OK),
    http2.rapid_reset: (0.3, OK | GONE),
    http2.hung_up: (3, GONE),
    http2.unread_stream: (1, LATE),
    http2.no_http2: (3, GONE),
    http2.broken_frame: (3, GONE),
    http2.random_frames: (3, GONE),
    http2.unknown_frames: (1, OK),
    http2.flood: (0.5, OK | GONE),
}
CLIENT: dict[Callable[[Stubs, Random], str], tuple[float, frozenset[str]]] = {
    messages.cancelled: (4, OK | {"CANCELLED"}),
    messages.late: (4, OK | LATE),
}
MESSAGES: dict[str, tuple[float, Draw, str]] = {  # how often, what, the method
    "one wrong field": (10, messages.one_wrong_field(), "sampler.Generate"),
    "any message": (8, messages.any_message(), "sampler.Generate"),
    "lying tensors": (10, messages.lying_tensors(), "kserve.ModelInfer"),
    "views of no scene": (3, messages.views, "sampler.Render"),
    "unknown models": (3, messages.names, "models.GetModel"),
}
STREAMS = 2.0  # how often a stream of lying tensors is


@dataclass
class Report:
    """What happened, by kind of call."""

    seen: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # ends that are not allowed
    curve: list[tuple[int, float]] = field(default_factory=list)  # (calls, MiB)
    warm_up: int = 0  # calls before memory counts
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def calls(self) -> int:
        return sum(sum(counts.values()) for counts in self.seen.values())

    def add(self, kind: str, status: str, allowed: frozenset[str], what: object = "") -> None:
        """Note how a call ended."""
        with self._lock:
            self.seen.setdefault(kind, Counter())[status] += 1
            if status not in allowed:
                self.wrong.append(f"{kind}: {status}, not {'/'.join(sorted(allowed))} {str(what)[:400]}")

    @property
    def growth(self) -> float:
        """Memory at the end over that after the warm-up, less 1: the least of a quarter of the samples each.

        A large message's memory comes and goes by 15 MiB between two looks; what stays is the least that is seen.
        """
        after = [mib for calls, mib in self.curve if calls >= min(self.warm_up, self.curve[-1][0])]
        part = max(1, len(after) // 4)
        return min(after[-part:]) / min(after[:part]) - 1

    def table(self) -> str:
        """Kinds x statuses."""
        rows = [f"{'kind':<20} {'calls':>6}  how they ended"]
        for kind, counts in self.seen.items():
            said = ", ".join(f"{status} {number}" for status, number in counts.most_common())
            rows.append(f"{kind:<20} {counts.total():>6}  {said}")
        return "\n".join(rows)

    def to_json(self, **more: Any) -> str:
        """All of it."""
        values = {"calls": self.calls, "warm_up": self.warm_up, "growth": self.growth, "wrong": self.wrong}
        return json.dumps({**values, "kinds": self.seen, "mib_by_calls": self.curve, **more}, indent=1)


@contextmanager
def served() -> Iterator[SamplerProcess]:
    """A sampler of two tiny models, `digits` and the slow `slow`."""
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(f"{folder}/store")
        publish_denoiser(store, Path(folder) / "a")
        publish_denoiser(store, Path(folder) / "b", name="slow", sampler=teacher_spec())
        environment = {
            "DISTILLERY_CACHE_DIR": f"{folder}/cache",
            "DISTILLERY_SAMPLER_PRELOAD": '["digits", "slow"]',
            "DISTILLERY_SAMPLER_INSTANCES": "1",
            "DISTILLERY_SAMPLER_MAX_QUEUE_IMAGES": "1024",
        }
        with SamplerProcess(store.url, environment) as sampler:
            yield sampler


def fuzz(sampler: SamplerProcess, calls: int, *, start: int = 0, warm_up: int = 0) -> Report:
    """Send about `calls` calls, `THREADS` at once; the first `warm_up` of them do not count for the memory."""
    report = Report(warm_up=warm_up)
    stubs = Stubs(sampler.address)
    reference = Reference(stubs)
    process = psutil.Process(sampler.process.pid)
    weights = [of[0] for table in (HTTP2, CLIENT, MESSAGES) for of in table.values()]
    share = calls * 0.95 / (sum(weights) + STREAMS)
    tasks: list[Callable[[], None]] = [
        partial(_drawn, report, stubs, kind, of, min(CHUNK, count - at), start + at)
        for kind, of in MESSAGES.items()
        for count in [max(1, round(of[0] * share))]
        for at in range(0, count, CHUNK)
    ]
    tasks += [
        partial(_streamed, report, stubs, min(CHUNK, count - at), start + at)
        for count in [max(1, round(STREAMS * share))]
        for at in range(0, count, CHUNK)
    ]
    for kind, (weight, allowed) in [*HTTP2.items(), *CLIENT.items()]:
        target = sampler.port if kind in HTTP2 else stubs
        for number in range(max(1, round(weight * share))):
            tasks.append(partial(_called, report, kind, target, allowed, Random(f"{start} {number}")))
    for number in range(max(1, calls // 20)):
        random = Random(f"{start} {number}")
        tasks.append(lambda random=random: report.add(RIGHT, reference.check(stubs, random), OK))  # type: ignore[misc]
    Random(start).shuffle(tasks)
    part = -(-len(tasks) // RESTS)
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(tasks), part):
            for done in [pool.submit(task) for task in tasks[at : at + part]]:
                done.result()
            time.sleep(min(REST_S, part / 1000))  # what is under way takes memory too
            report.curve.append((report.calls, process.memory_info().rss / 2**20))
    health = health_pb2_grpc.HealthStub(stubs.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    serving = health.status == health_pb2.HealthCheckResponse.SERVING
    report.add("health", "SERVING" if serving else "NOT SERVING", frozenset({"SERVING"}))
    return report


def _called(report: Report, kind: Any, target: Any, allowed: frozenset[str], random: Random) -> None:
    report.add(kind.__name__, kind(target, random), allowed)


def _run(strategy: st.SearchStrategy[Any], count: int, start: int, see: Callable[[Any], None]) -> None:
    """Draw `count` values."""

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value: Any) -> None:
        see(value)

    draw()


def _drawn(
    report: Report, stubs: Stubs, kind: str, of: tuple[float, Draw, str], count: int, start: int
) -> None:
    _, strategy, method = of
    service, name = method.split(".")
    send = getattr(getattr(stubs, service), name)

    def see(drawn: tuple[Any, frozenset[str]]) -> None:
        request, allowed = drawn
        report.add(kind, ended(lambda: send(request, timeout=20)), allowed, request)

    _run(strategy, count, start, see)


def _streamed(report: Report, stubs: Stubs, count: int, start: int) -> None:
    def see(drawn: list[tuple[Any, frozenset[str]]]) -> None:
        report.add("lying streams", messages.stream_of(drawn, stubs), OK, drawn)

    _run(st.lists(messages.lying_tensors(), max_size=4), count, start, see)


def main(arguments: list[str]) -> int:
    """Fuzz, print, write; the exit code."""
    calls = int(arguments[0]) if arguments else CALLS
    began = time.monotonic()
    with served() as sampler:
        report = fuzz(sampler, WARM_UP + calls, warm_up=WARM_UP)
        tracebacks = sum("exception" in event for event in sampler.events)
    seconds = time.monotonic() - began
    file = Path("out/fuzz/sampler.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(report.to_json(seconds=round(seconds, 1), tracebacks=tracebacks), encoding="utf-8")
    print(report.table())
    print("MiB by calls:", " ".join(f"{at}:{mib:.1f}" for at, mib in report.curve))
    print(f"{report.calls} calls in {seconds:.0f} s; {file}")
    measured = report.calls - WARM_UP
    print(
        f"memory {report.growth:+.1%} over {measured} calls, after a warm-up of {WARM_UP}; allowed {GROWTH:.0%}"
    )
    for line in report.wrong[:20]:
        print("WRONG", line)
    return 1 if report.wrong or abs(report.growth) > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

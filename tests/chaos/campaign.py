"""A campaign: some faults on one world after another, and the verdict over all of them."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos import servers
from tests.chaos.faults import FAULTS, Fault, NotNow
from tests.chaos.verdict import Verdict, judge
from tests.chaos.work import KINDS, Feeder, Reference
from tests.chaos.world import BROKERS, World, missing, world

_DRAIN_S = 600.0  # for the jobs to end once nothing disturbs them any more
_START_S = 60.0
Tell = Callable[[int, str], None]  # (faults done, what happens now)


@dataclass(frozen=True)
class Options:
    """What a campaign does. The same seed chooses the same faults in the same order."""

    seed: int
    faults: int = 200
    brokers: tuple[str, ...] = BROKERS
    minutes: float = 20.0  # of faults, over all brokers; making references and draining take their own time
    pause_s: float = 0.5  # mean time between two faults, in which jobs get on
    kinds: tuple[str, ...] = KINDS
    only: tuple[str, ...] = ()  # names of faults; empty: all


@dataclass
class Result:
    """What a campaign came to."""

    options: Options
    verdict: Verdict = field(default_factory=Verdict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (fault, broker) -> how often
    missed: Counter[str] = field(default_factory=Counter)  # fault -> how often nothing of its kind ran
    brokers: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        values = {name: value for name, value in vars(self.verdict).items() if name != "said"}
        only = self.options.only
        kinds = sorted(fault.name for fault in FAULTS if not only or fault.name in only)
        per_fault = {kind: {b: self.counts[kind, b] for b in self.brokers} for kind in kinds}
        return {
            "faults": self.counts.total(),
            **values,
            "seed": self.options.seed,
            "seconds": round(self.seconds, 1),
            "brokers": self.brokers,
            "by_fault": per_fault,
            "missed": dict(sorted(self.missed.items())),
            "skipped": self.skipped,
            "said": self.verdict.said,
        }


def run(options: Options, *, tell: Tell = lambda done, what: None) -> Result:
    """Run a campaign in temporary folders."""
    result = Result(options)
    started = time.monotonic()
    result.skipped = [said for broker in options.brokers if (said := missing(broker))]
    result.brokers = [broker for broker in options.brokers if not missing(broker)]
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, servers.postgres() as postgres:
        if postgres is None:
            result.skipped.append("crash_database: PostgreSQL is not installed")
        folder = Path(name)
        reference = Reference.make(
            folder / "reference", options.kinds, lambda what: tell(0, f"undisturbed {what}")
        )
        for index, broker in enumerate(result.brokers):
            rng = Random(f"{options.seed}/{broker}")
            share = options.faults * (index + 1) // len(result.brokers) - result.counts.total()
            seconds = 60 * options.minutes / len(result.brokers)
            own = postgres if broker == "redis" else None  # the others keep their jobs in SQLite
            with world(folder / broker, broker, store=reference.store, postgres=own) as made:
                result.verdict += _disturb(result, made, reference, rng, share, seconds, tell)
    result.seconds = time.monotonic() - started
    return result


def _disturb(
    result: Result, made: World, reference: Reference, rng: Random, share: int, seconds: float, tell: Tell
) -> Verdict:
    options, address = result.options, f"127.0.0.1:{made.settings.jobs_port}"
    feeder = Feeder(address, reference, options.kinds, Random(rng.random()))
    feeder.unfinished = made.unfinished
    feeder.start()
    _wait(lambda: made.unfinished() not in (0, 1000), _START_S)
    possible = _possible(made, options.only, result.skipped)
    sequence, goal = _sequence(possible, rng), result.counts.total() + share
    until = time.monotonic() + seconds
    while result.counts.total() < goal and time.monotonic() < until:
        fault = next(sequence)
        tell(result.counts.total(), f"{made.broker}: {fault.name}")
        try:
            fault.do(made, rng)
            result.counts[fault.name, made.broker] += 1
        except NotNow:
            result.missed[fault.name] += 1
        time.sleep(rng.expovariate(1 / options.pause_s))
    tell(result.counts.total(), f"{made.broker}: waiting for the jobs to end")
    feeder.stopping.set()
    feeder.depth = 0
    feeder.join(timeout=30)
    _wait(lambda: made.unfinished() == 0, _DRAIN_S)
    return judge(made, feeder, reference)


def _possible(made: World, only: tuple[str, ...], skipped: list[str]) -> list[Fault]:
    wanted = [fault for fault in FAULTS if not only or fault.name in only]
    reasons = {said for fault in wanted if (said := fault.missing(made))}
    skipped += [f"{made.broker}: {said}" for said in sorted(reasons)]
    return [fault for fault in wanted if not fault.missing(made)]


def _sequence(possible: list[Fault], rng: Random) -> Iterator[Fault]:
    """All kinds once in a random order, then all again."""
    while True:
        yield from rng.sample(possible, len(possible))


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)

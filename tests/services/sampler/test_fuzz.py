"""A short seed of `make fuzz-sampler`: broken calls of every kind against a live sampler."""

from __future__ import annotations

import json

import pytest

from tests.services.fuzz import run
from tests.services.fuzz.run import RIGHT, Report, fuzz, served

CALLS = 500


@pytest.fixture(scope="module")
def fuzzed():
    with served() as sampler:
        report = fuzz(sampler, CALLS, start=2)
        yield sampler, report


def test_every_broken_call_ends_as_it_must_and_right_ones_in_between_are_answered(fuzzed):
    _, report = fuzzed
    kinds = len(run.HTTP2) + len(run.CLIENT) + len(run.MESSAGES)
    assert not report.wrong, "\n".join(report.wrong[:10])
    assert len(report.seen) == kinds + 3  # the streams, the right calls, the health of the server
    assert report.seen[RIGHT] == {"OK": CALLS // 20}
    assert report.calls > CALLS * 0.8


def test_a_caller_who_breaks_a_call_leaves_no_traceback_in_the_log(fuzzed):
    sampler, _ = fuzzed
    assert not [event for event in sampler.events if event.get("event") == "call failed"]


def test_a_forbidden_end_and_memory_that_grows_are_reported():
    report = Report(curve=[(at, 100.0 + at / 10) for at in range(0, 1001, 10)], warm_up=300)
    report.add("kind", "OK", frozenset({"INVALID_ARGUMENT"}), "what was sent")
    assert report.wrong == ["kind: OK, not INVALID_ARGUMENT what was sent"]
    assert report.growth == pytest.approx(0.41, abs=0.02)
    flat = Report(curve=[(at, 100.0 + min(at, 300) / 10) for at in range(0, 1001, 10)], warm_up=300)
    assert flat.growth == 0
    assert json.loads(flat.to_json())["warm_up"] == 300
    assert json.loads(report.to_json())["kinds"] == {"kind": {"OK": 1}}

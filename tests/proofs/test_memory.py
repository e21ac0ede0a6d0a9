"""A short `make prove-memory`: the same run with fewer calls and swaps, and what its figure would notice."""

from __future__ import annotations

import os

import pytest

from tests.proofs.memory import Curve, measure

MIB = 2**20


def curve(sizes: list[int]) -> Curve:
    made = Curve(os.getpid(), "swaps")
    made.points = list(enumerate(sizes))
    return made


def test_what_grows_all_along_is_not_flat_and_what_settles_is():
    settled = curve([50 * MIB] * 10 + [100 * MIB] * 90).summary()
    assert (settled["flat"], settled["change"]) == (True, 0.0)
    leaking = curve([100 * MIB + done * MIB // 4 for done in range(100)]).summary()
    assert not leaking["flat"]
    assert leaking["change"] == pytest.approx(0.17, abs=0.02)
    assert leaking["count"] == 99


def test_a_sampler_without_torch_is_asked_and_swapped_and_does_not_leak_a_network_a_swap(tmp_path):
    said: list[str] = []
    report = measure(tmp_path, 100, 3, said.append)
    asked, swapped = report["memory"]
    assert (asked["count"], swapped["count"]) == (100, 3)
    assert asked["change"] < 0.1
    assert len(swapped["curve"]) == 4
    assert len(said) == 3

"""Claims judged from figures, without training anything."""

from __future__ import annotations

import pytest

from distill_core.errors import ConfigError
from distill_core.recipe.claims import CheckConfig
from distill_core.recipe.verdicts import verdict

OFF = {"config.key_part": False}


def judged(figures, off=None, **claim):
    """The verdict over runs with these figures, and with `off` those of the ablation; and what was measured."""
    asked = []

    def measure(changes):
        asked.append(dict(changes))
        return [off] if changes else [figures]

    return verdict(CheckConfig.parse(claim), measure), asked


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
        ({"at_least": 2.0}, True),
        ({"at_least": 2.1}, False),
        ({"reference": "teacher", "ratio_at_most": 0.5}, True),
        ({"reference": "teacher", "ratio_at_most": 0.49}, False),
        ({"reference": "teacher", "ratio_at_least": 0.5}, True),
        ({"reference": "teacher", "ratio_at_least": 0.51}, False),
        ({"ablation": {"set": OFF, "ratio_at_least": 3.0}}, True),
        ({"ablation": {"set": OFF, "ratio_at_least": 3.1}}, False),
        ({"ablation": {"set": OFF, "gap_at_least": -4.0}}, True),
        ({"ablation": {"set": OFF, "gap_at_least": -3.9}}, False),
        ({}, False),  # a claim without a bound claims nothing
    ],
)
def test_a_claim_holds_up_to_its_bound(claim, holds):
    found, _ = judged({"fd": 2.0, "teacher": 4.0}, {"fd": 6.0}, metric="fd", **claim)
    assert found["passed"] is holds


def test_every_further_claim_must_hold_too_and_one_ablation_serves_several():
    ablation = {"set": OFF, "ratio_at_least": 2.0}
    also = [{"metric": "std", "at_least": 1.0, "ablation": {"set": OFF, "gap_at_least": 0.5}}]
    claim = {"metric": "fd", "at_most": 2.0, "ablation": ablation, "also": also}
    found, asked = judged({"fd": 2.0, "std": 1.0}, {"fd": 4.0, "std": 0.5}, **claim)
    assert found["passed"]
    assert asked == [{}, OFF]
    assert found["also"] == [
        {"passed": True, "metric": "std", "measured": 1.0, "reference": None, "ablation": 0.5}
    ]
    found, _ = judged({"fd": 2.0, "std": 0.9}, {"fd": 4.0, "std": 0.1}, **claim)
    assert not found["passed"]


def test_figures_are_means_over_the_seeds():
    runs = [{"fd": 1.0}, {"fd": 3.0}]
    assert verdict(CheckConfig(metric="fd", at_most=2.0), lambda changes: runs)["measured"] == 2.0


def test_a_figure_that_was_not_measured_is_named_with_those_that_were():
    with pytest.raises(ConfigError, match=r"'psnr' was not measured; known: fd, std"):
        judged({"fd": 2.0, "std": 1.0}, metric="psnr", at_least=1.0)


@pytest.mark.parametrize("claim", [{"ratio_at_most": 1.0}, {"reference": "teacher", "at_most": 1.0}])
def test_a_ratio_and_its_reference_come_together(claim):
    with pytest.raises(ConfigError, match="a ratio needs a reference"):
        CheckConfig.parse({"metric": "fd", **claim})

"""Overrides travel to the Jobs API as TOML values, whatever their type."""

from __future__ import annotations

import pytest

from distill_core.recipe import parse_overrides
from distillery_trainer.client import train_spec


@pytest.mark.parametrize(
    "value",
    [
        1,
        -2.5,
        True,
        "text with 'quotes' and [brackets], {braces}",
        [],
        [1, [2, 3]],
        {},
        {"name": "images", "size": [1, 2]},
    ],
)
def test_an_override_arrives_as_it_was_given(value):
    spec = train_spec("dmd2", {"key": value})
    assert parse_overrides([f"key={spec.overrides['key']}"]) == {"key": value}

"""docs/pipelines.md: its rows are those of the families' table, its figures what was kept, and all near enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_core.networks.families import FAMILIES
from tests.tiny_pipelines import BUILDERS
from tools.pipelines import COLUMNS, PAGE, cells, kept, page

ROOT = Path(__file__).parents[1]
ROWS = kept(ROOT)


def test_the_rows_are_those_of_the_families_table():
    assert ROWS.keys() == BUILDERS.keys()
    prompted = {name for name, family in FAMILIES.items() if family.guidance != 1 or family.pipeline}
    assert {row["network"] for row in ROWS.values()} == prompted
    for row in ROWS.values():
        family = FAMILIES[row["network"]]
        named = {"StableDiffusionPipeline", "StableDiffusionXLPipeline"} if not family.pipeline else set()
        assert row["pipeline"] in named | {family.pipeline}


def test_the_page_is_written_from_the_figures():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_form_is_near_enough_to_the_pipelines_own(name):
    least = {column: 60 if column == "onnx" else 90 for column in COLUMNS}
    found = {column: ROWS[name].get(column) for column in COLUMNS}
    assert all(value is None or value >= least[column] for column, value in found.items())
    assert ROWS[name]["other_prompt"] < 50
    without = {column for column, value in found.items() if value is None}
    assert without == ({"lora"} if name == "pixart" else set())  # diffusers loads no LoRA of PixArt
    assert len(cells(ROWS[name])) == len(COLUMNS) + 2

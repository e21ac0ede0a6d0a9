"""Damaged pictures that a run was told to leave out are counted where its figures are."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from distill_core import api
from distill_core.recipe import load_recipe


def test_the_number_of_pictures_left_out_is_in_the_metrics_and_figures_of_a_run(tmp_path):
    draws = np.random.default_rng(0)
    for number in range(5):
        noise = draws.integers(0, 256, (8, 8), dtype=np.uint8)
        folder = tmp_path / "set" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (tmp_path / "set/1/9.png").write_text("no picture")
    recipe = load_recipe("judge_digits").override(
        {
            "steps": 2,
            "batch_size": 4,
            "data": {"name": "images", "path": str(tmp_path / "set"), "skip_damaged": True},
            "config.held_out": {},
        }
    )
    recipe = recipe.model_copy(update={"publish": None, "check": None})
    where = api.context(tmp_path / "store", tmp_path / "cache")
    result = api.train(recipe, tmp_path / "run", where)
    assert result.figures["skipped_pictures"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["skipped_pictures"] == 1
    assert "skipped_pictures" not in lines[-1]

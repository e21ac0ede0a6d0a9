"""Checking: a recipe's claims against what is measured, with the method's key part on and off."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_core.context import Context
from distill_core.errors import ConfigError
from distill_core.recipe import load_recipe
from distill_core.recipe.verdicts import verdict
from distill_core.running.train import missing_first, train
from distill_core.training.run_folder import Listener


def check(name: str, context: Context, *, listener: Listener | None = None) -> dict[str, Any]:
    """Run a recipe's claims and their ablations: `{name, passed, measured, ablation, also, seconds, ...}`.

    Raises:
        ConfigError: the recipe makes no claim.
    """
    recipe = load_recipe(name)
    if recipe.check is None:
        raise ConfigError(f"recipe {name} has no [check] table, so it claims nothing", field="check")
    claim = recipe.check
    sized = recipe.override(claim.set).model_copy(update={"publish": None})
    missing_first(sized, context, listener)  # a teacher that must be trained first is not this method's time
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="distillery-check-") as scratch:
        folders = (Path(scratch) / str(number) for number in itertools.count())
        measured_with: dict[str, str] = {}

        def measure(changes: Mapping[str, Any]) -> list[dict[str, float]]:
            seeded = [sized.override(changes).model_copy(update={"seed": seed}) for seed in claim.seeds]
            results = [train(run, next(folders), context, listener=listener) for run in seeded]
            measured_with.update(results[0].measured_with)
            return [result.figures for result in results]

        judged = verdict(claim, measure)
    seconds = round(time.perf_counter() - began, 1)
    return {"name": name, **judged, "measured_with": measured_with, "seconds": seconds}

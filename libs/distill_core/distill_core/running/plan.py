"""Planning: what training a recipe needs of memory, without having it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from distill_core.building import build
from distill_core.context import Context
from distill_core.methods import find_method
from distill_core.networks.fake_tensors import fake_tensors, real_tensors
from distill_core.recipe import Recipe
from distill_core.training.memory import MemoryPlan, Unplannable, plan_memory, refusing_values


def untrained(context: Context, folder: Path) -> Context:
    """The same context with models made as recipes say, in `folder`, but not trained: for sizes and times."""

    def make(recipe: Recipe, target: Path) -> Path:
        with real_tensors():
            method, _ = build(recipe, new_context)
            method.main.save(target / "model")
        return target / "model"

    fetched = context.cache / "artifacts"
    fetched.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "artifacts").symlink_to(fetched.absolute())  # not fetched anew
    new_context = replace(context, cache=folder, train=make)
    return new_context


def plan(recipe: Recipe, context: Context) -> MemoryPlan:
    """The memory that training `recipe` needs, in seconds and without having it: no weights are read.

    Scenes, whose steps depend on the values of their tensors and which are small, are made and take one step.

    Raises:
        DistilleryError: a mistake in the recipe. Unplannable: another method whose step depends on values.
    """
    with tempfile.TemporaryDirectory(prefix="distillery-plan-") as scratch:
        try:
            with fake_tensors():
                with refusing_values(recipe.method):
                    method, source = build(recipe, untrained(context, Path(scratch) / "fake"))
                return plan_memory(method, source, recipe)
        except Unplannable:
            if find_method(recipe.method).plan != "step":
                raise
        method, source = build(recipe, untrained(context, Path(scratch)))
        return plan_memory(method, source, recipe)

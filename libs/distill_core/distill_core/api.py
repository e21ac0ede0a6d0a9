"""Functions of Distillery: train, evaluate, publish, load, check. Services and commands call these."""

from __future__ import annotations

from typing import Any

from distill_core.errors import DistilleryError
from distill_core.methods import family, find_method, method_names, needs
from distill_core.recipe import load_recipe, recipe_names
from distill_core.recipe.published_models import PUBLISHED
from distill_core.running.check import check
from distill_core.running.evaluate import Evaluation, evaluate
from distill_core.running.importing import Imported, Wish, import_model
from distill_core.running.models import export_adapter, load, merge_adapters
from distill_core.running.plan import plan, untrained
from distill_core.running.publish import publish
from distill_core.running.train import Result, context, prepare, train

__all__ = [
    "Evaluation",
    "Imported",
    "Result",
    "Wish",
    "check",
    "context",
    "describe_methods",
    "evaluate",
    "export_adapter",
    "import_model",
    "load",
    "merge_adapters",
    "plan",
    "prepare",
    "publish",
    "train",
    "untrained",
    "user_message",
]


def describe_methods() -> list[dict[str, Any]]:
    """Name, family, paper, needs and recipes of every method there is.

    `recipes` run as they are, or on data of the user's; `model_recipes`, each with the model that it is for, have
    published settings for a teacher of the user's.
    """
    by_method: dict[str, list[str]] = {}
    for_models: dict[str, dict[str, str]] = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.for_model is None:
            by_method.setdefault(recipe.method, []).append(name)
        else:
            for_models.setdefault(recipe.method, {})[name] = PUBLISHED[recipe.for_model].title
    described = []
    for name in method_names():
        cls = find_method(name)
        described.append(
            {
                "name": name,
                "family": family(cls),
                "paper": cls.paper,
                "needs": needs(cls),
                "recipes": by_method.get(name, []),
                "model_recipes": for_models.get(name, {}),
            }
        )
    return described


def user_message(error: BaseException) -> str:
    """One sentence for a person."""
    return str(error) if isinstance(error, DistilleryError) else f"{type(error).__name__}: {error}"

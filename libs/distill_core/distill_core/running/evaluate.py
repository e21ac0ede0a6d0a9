"""Evaluation: figures of a run's result, or of a published model, by what its kind measures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from distill_core.context import Context
from distill_core.data import Source, build_source
from distill_core.errors import ConfigError
from distill_core.kinds import find_kind
from distill_core.kinds.base import Evaluator, Measured
from distill_core.method import Method
from distill_core.recipe import Recipe
from distill_core.running.models import load


class Evaluation(NamedTuple):
    """Figures of a model, and in words what they rest on."""

    figures: dict[str, float]
    measured_with: dict[str, str]


def evaluator_of(method: Method, source: Source, recipe: Recipe, context: Context) -> Evaluator | None:
    """The evaluator of the method's result; None for results that nothing measures but the method itself."""
    kind = find_kind(method.kind)
    config = kind.Evaluate.parse(recipe.evaluate, where="evaluate")
    if kind.needs_held_out and config.data is None:
        return None
    return kind.evaluator(method.main, source, config, context)


def figures_of(method: Method, recipe: Recipe, evaluator: Any) -> Measured:
    """The method's own figures, and with an evaluator those of its result and of what that is compared with."""
    config = find_kind(method.kind).Evaluate.parse(recipe.evaluate, where="evaluate")
    own = dict(method.figures(config))
    if evaluator is None:
        return Measured(own)
    measured: Measured = evaluator.measure(method.main, method.references())
    return replace(measured, figures=own | measured.figures)


def evaluate(ref: str, table: dict[str, Any], data: dict[str, Any] | None, context: Context) -> Evaluation:
    """Figures of a published model on `data`, or on the data that the `[evaluate]` table names.

    Raises:
        ConfigError: nothing to measure with, or nothing to compare with.
    """
    model = load(ref, context)
    if not hasattr(model, "kind"):
        raise ConfigError(
            f"nothing can be measured of {ref}: it measures other models; name it in evaluate instead",
            field="model",
        )
    kind = find_kind(model.kind)
    config = kind.Evaluate.parse(table, where="evaluate")
    table_of_data = data or config.data
    if table_of_data is None:
        raise ConfigError("evaluate needs data to compare with, e.g. data.name = 'digits'", field="data")
    source = build_source(table_of_data, folders=context)
    evaluator = kind.evaluator(model, source, config.model_copy(update={"data": None}), context)
    if evaluator is None:
        raise ConfigError(
            f"nothing can be measured of {ref}, a {kind.name}: set what measures it in evaluate "
            f"({', '.join(sorted(kind.Evaluate.model_fields))}), and data of its shape",
            field="evaluate",
        )
    measured = evaluator.measure(model, {})
    return Evaluation(measured.figures, measured.rests_on)

"""Figures and charts of classifiers on labelled items: accuracy, likelihood, calibration, the cost of an answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_core.data import Source
from distill_core.data.classes import ABSENT, class_numbers
from distill_core.errors import ConfigError, nearest
from distill_core.kinds.base import Measured
from distill_core.kinds.predictor.card import Card, Evaluate
from distill_core.kinds.predictor.pictures import Answers, charts
from distill_core.metrics.classification import (
    accuracy,
    calibration_error,
    group_accuracy,
    negative_log_likelihood,
    risk_coverage_area,
)
from distill_core.networks.modes import evaluating
from distill_core.networks.predictor import column_of
from distill_core.recipe.tables import EvaluateConfig
from distill_core.signature import TensorSpec

TIMED, REPEATS = 32, 5  # items of a call whose time is measured, and such calls


@dataclass(frozen=True)
class Parts:
    """What of the answers is measured apart: classes by group, items by the value of a column or its range."""

    groups: Mapping[str, Collection[int]]
    by: str | None = None
    ranges: Mapping[str, tuple[str, float, float]] | None = None

    def accuracies(self, answers: Answers) -> dict[str, float]:
        """Accuracy of each part by its name; NaN where it has no item."""
        found = {
            f"{name}_accuracy": group_accuracy(answers.logits, answers.labels, of)
            for name, of in self.groups.items()
        }
        for name, (column, low, high) in (self.ranges or {}).items():
            values = answers.columns[column]
            found[f"{name}_accuracy"] = answers.accuracy_of((values >= low) & (values <= high))
        for value, right in (answers.by(self.by) if self.by else {}).items():
            found[f"{self.by}_{value:g}_accuracy"] = right
        return found


class ClassifierEvaluator:
    """Evaluator of classifiers on labelled data."""

    def __init__(
        self, source: Source, config: EvaluateConfig, card: Card, parts: Parts, beside: Mapping[str, Any]
    ) -> None:
        self.source, self.config, self.card, self.parts = source, config, card, parts
        self.beside = beside
        for name, other in beside.items():
            self._check_beside(other, f"evaluate.beside.{name}")

    def measure(
        self,
        model: Any,
        references: Mapping[str, Any],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Measured:
        """Figures of a classifier, and of those references that answer the same question, by their names."""
        answers = {"": self._answers(model)}
        for name, other in {**references, **self.beside}.items():
            if self._answered_by(other):
                answers[name] = self._answers(other)
        figures = {
            f"{name}_{key}" if name else key: value
            for name, given in answers.items()
            for key, value in self._figures(given).items()
        }
        own = answers.pop("")
        pictures = charts(own, answers, self.card.class_names, self.parts.by)
        return Measured(figures, {"accuracy": f"{len(own.labels)} labelled items"}, pictures)

    def _check_beside(self, other: Any, field: str) -> None:
        if not self._answered_by(other):
            names = other.card().class_names if getattr(other, "kind", "") == "predictor" else ()
            raise ConfigError(
                f"{field} names a model of the classes {', '.join(names) or '(none)'}, and the result's are "
                f"{', '.join(self.card.class_names)}; choose a classifier of the same items and classes",
                field=field,
            )

    def _answered_by(self, other: Any) -> bool:
        """Whether a reference takes the same items and tells the same classes apart."""
        if getattr(other, "kind", "") != "predictor" or other.card().class_names != self.card.class_names:
            return False
        return fits(other.card(), self.source)

    def _figures(self, answers: Answers) -> dict[str, float]:
        logits, labels = answers.logits, answers.labels
        return {
            "accuracy": accuracy(logits, labels),
            "negative_log_likelihood": negative_log_likelihood(logits, labels),
            "calibration_error": calibration_error(logits, labels),
            "risk_coverage_area": risk_coverage_area(logits, labels),
            **self.parts.accuracies(answers),
            "parameters": float(answers.parameters),
        }

    def _answers(self, model: Any) -> Answers:
        return answers_of(
            model, self.source, self.source.picked(self.config.num_samples), batch_size=self.config.batch_size
        )


def answers_of(
    model: Any, source: Source, indices: Tensor, *, batch_size: int, timed: bool = True
) -> Answers:
    """What a classifier answers to the items at `indices` (N,), and how long it takes for one."""
    name = next(iter(_inputs(model.card())))
    column = column_of(name)
    device = next(model.parameters()).device

    @torch.no_grad()
    def ask(items: Tensor) -> Tensor:
        logits: Tensor = model.call("predict", {name: items.to(device)})["logits"]
        return logits.float().cpu()

    with evaluating(model):
        batches = [source.items(part) for part in indices.split(batch_size)]
        logits = torch.cat([ask(batch.columns[column]) for batch in batches])
        seconds = _seconds(ask, batches[0].columns[column][:TIMED]) if timed else float("nan")
    further = {key for key, spec in source.columns.items() if not spec.shape} - {"class_label"}
    columns = {key: torch.cat([batch.columns[key] for batch in batches]) for key in further}
    labels = torch.cat([batch.columns["class_label"] for batch in batches])
    return Answers(logits, labels, columns, model.card().parameters, seconds)


def _seconds(ask: Callable[[Tensor], Tensor], items: Tensor) -> float:
    """The median time of an item, asked with so many others."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        ask(items)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(items)


def asked_of(card: Card, source: Source) -> str | None:
    """The column of `source` that a classifier is asked about; None where it is no classifier, or of other items."""
    inputs = _inputs(card)
    if len(inputs) != 1 or not card.class_names or source.labels is None:
        return None
    column = column_of(next(iter(inputs)))
    return column if column in source.columns else None


def fits(card: Card, source: Source) -> bool:
    """Whether a classifier takes items of the shape that those of `source` have."""
    column = asked_of(card, source)
    spec = next(iter(_inputs(card).values()), None)
    return column is not None and spec is not None and spec.fits(source.columns[column].shape)


def check_fits(card: Card, source: Source, owner: str, *, field: str) -> None:
    """Refuse a classifier that takes items of another shape than those of `source`.

    Raises:
        ConfigError: it does; `owner` is what the sentence calls it.
    """
    if not fits(card, source):
        taken = ", ".join(f"{name} {spec.described}" for name, spec in _inputs(card).items())
        given = ", ".join(f"{name} {spec.shape}" for name, spec in source.columns.items())
        raise ConfigError(
            f"{owner} takes {taken}, and the data has {given}; choose data that fits", field=field
        )


def parts_of(config: EvaluateConfig, card: Card, source: Source) -> Parts:
    """What `[evaluate]` measures apart.

    Raises:
        ConfigError: a class that the model does not know, or a column that the data does not have.
    """
    if not isinstance(config, Evaluate):
        return Parts({})
    ranges = {name: (part.column, part.low, part.high) for name, part in config.ranges.items()}
    wanted = {f"evaluate.ranges.{name}.column": column for name, (column, _, _) in ranges.items()}
    if config.by is not None:
        wanted["evaluate.by"] = config.by
    numbers = [key for key, spec in source.columns.items() if not spec.shape and key != "class_label"]
    for field, column in wanted.items():
        if column not in numbers:
            raise ConfigError(
                f"{field} names a column {column!r}, and the data has no such numbers{nearest(column, numbers)}",
                field=field,
            )
    return Parts(_numbered_groups(config, card.class_names), config.by, ranges)


def _numbered_groups(config: Evaluate, known: tuple[str, ...]) -> dict[str, list[int]]:
    """The numbers of the classes in each group of `[evaluate.groups]`.

    Raises:
        ConfigError: a class that the model does not know.
    """
    found: dict[str, list[int]] = {}
    for group, names in config.groups.items():
        found[group] = class_numbers(names, known)
        if ABSENT in found[group]:
            name = names[found[group].index(ABSENT)]
            raise ConfigError(
                f"evaluate.groups.{group} names a class {name!r}, and the model has none of that name"
                f"{nearest(name, known)}",
                field=f"evaluate.groups.{group}",
            )
    return found


def _inputs(card: Card) -> dict[str, TensorSpec]:
    function = next(iter(card.functions.values()), None)
    return {} if function is None else function.inputs

"""What students of classifiers share: how they are made, and how their teachers are asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.data.classes import use_class_names
from distill_core.errors import ConfigError
from distill_core.networks.new_classifier import classifier_of_column
from distill_core.networks.predictor import Predictor, check_classifier, input_of
from distill_core.recipe.tables import NetworkConfig

LABELLED = {"x0": "the views that teacher and student see", "class_label": "the cross-entropy"}


def new_classifier(
    network: NetworkConfig, data: Source, *, class_names: tuple[str, ...] = (), field: str = "network"
) -> Predictor:
    """A classifier with fresh weights of the data's pictures, and of its classes or of those that are given."""
    return classifier_of_column(network, data, "x0", class_names=class_names, field=field)


def use_classes_of(teacher: nn.Module, data: Source, method: str, column: str = "x0") -> None:
    """Make the labels of `data` those of the teacher, who is asked about the items' `column`.

    Raises:
        ConfigError: the teacher is no classifier, does not know a class of the data, or takes other items.
    """
    use_class_names(data, _named_classes(teacher, method))
    shape = data.columns[column].shape if column in data.columns else ()
    check_classifier(teacher, shape, "the teacher", field="teacher", name=input_of(column))


def classes_of(teacher: nn.Module, data: Source, method: str) -> tuple[str, ...]:
    """The classes that the teacher tells apart in pictures of `data`, by name.

    Raises:
        ConfigError: it is no classifier, or takes other pictures.
    """
    names = _named_classes(teacher, method)
    check_classifier(teacher, data.shape or (), "the teacher", field="teacher")
    return names


def _named_classes(teacher: nn.Module, method: str) -> tuple[str, ...]:
    names: tuple[str, ...] = ()
    if getattr(teacher, "kind", "") == "predictor":
        names = teacher.card().class_names  # type: ignore[operator]
    if not names:
        raise ConfigError(
            f"{method} needs a classifier that names its classes as teacher, e.g. teacher.recipe = 'judge_digits'",
            field="teacher",
        )
    return names


@torch.no_grad()
def taught(teacher: nn.Module, items: Tensor, column: str = "x0") -> Tensor:
    """The teacher's logits (B, K) for pictures (B, C, H, W), or for items of another column."""
    logits: Tensor = teacher.call("predict", {input_of(column): items})["logits"]  # type: ignore[operator]
    return logits


def agreement(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a step of a classifier logs: its accuracy on the batch."""
    return {"train_accuracy": (logits.argmax(1) == labels).float().mean()}

"""Pictures of a classifier's answers: what it confuses, how sure it may be, and what accuracy costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill_core.charts import axes, matrix, picture, plain, short
from distill_core.metrics.classification import accuracy, calibration_error, confusion_matrix, reliability

MOST_CLASSES = 40  # rows of a confusion matrix; of more the most mistaken are shown
MOST_VALUES = 64  # of a column by which accuracy is shown
OTHERS = "all others"
SELF = "this model"


@dataclass(frozen=True)
class Answers:
    """Logits (N, K) of items with labels (N,), further numbers of the items, and the cost of an answer."""

    logits: Tensor
    labels: Tensor
    columns: Mapping[str, Tensor]
    parameters: int
    seconds: float  # for one item

    @property
    def accuracy(self) -> float:
        return accuracy(self.logits, self.labels)

    def accuracy_of(self, chosen: Tensor) -> float:
        """Accuracy of the items where `chosen` (N,) is true; NaN where it nowhere is."""
        return float((self.logits.argmax(1) == self.labels)[chosen].double().mean())

    def by(self, column: str) -> dict[float, float]:
        """Accuracy at each value of a column, ascending; of many values at those that are evenly spread."""
        values = self.columns[column].double()
        distinct = values.unique()
        places = (
            torch.arange(min(len(distinct), MOST_VALUES)) * len(distinct) // min(len(distinct), MOST_VALUES)
        )
        return {float(value): self.accuracy_of(values == value) for value in distinct[places]}


def charts(
    own: Answers, references: Mapping[str, Answers], names: tuple[str, ...], by: str | None
) -> dict[str, Image.Image]:
    """Charts by name, of a model beside its references."""
    everyone = {SELF: own, **{name.replace("_", " "): answers for name, answers in references.items()}}
    found = {
        "confusion_matrix": confusion(own.logits, own.labels, names),
        "reliability": reliability_diagram(everyone),
        "accuracy_by_parameters": against(
            everyone, "parameters", {name: float(one.parameters) for name, one in everyone.items()}
        ),
        "accuracy_by_time": against(
            everyone, "time per item, ms", {name: 1e3 * one.seconds for name, one in everyone.items()}
        ),
    }
    return found if by is None else {**found, f"accuracy_by_{by}": by_column(everyone, by)}


def confusion(logits: Tensor, labels: Tensor, names: tuple[str, ...], where: str = "") -> Image.Image:
    """The confusion matrix; of many classes those with the most mistakes, and the rest as one."""
    title = f"{len(labels)} {where}items, accuracy {accuracy(logits, labels):.3f}"
    shown, logits, labels = _most_mistaken(logits, labels, names)
    return picture(matrix(title, confusion_matrix(logits, labels).numpy(), shown, "answered", "label"))


def _most_mistaken(
    logits: Tensor, labels: Tensor, names: tuple[str, ...]
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names, answers and labels of at most `MOST_CLASSES` classes, and of all others as one."""
    if len(names) <= MOST_CLASSES:
        return names, logits, labels
    predicted = logits.argmax(1)
    wrong = predicted != labels
    mistakes = torch.bincount(torch.cat([labels[wrong], predicted[wrong]]), minlength=len(names))
    chosen = mistakes.argsort(descending=True, stable=True)[: MOST_CLASSES - 1].sort().values
    number = torch.full((len(names),), len(chosen))
    number[chosen] = torch.arange(len(chosen))
    shown = (*(names[place] for place in chosen.tolist()), OTHERS)
    return shown, torch.nn.functional.one_hot(number[predicted], len(shown)), number[labels]


def reliability_diagram(everyone: Mapping[str, Answers]) -> Image.Image:
    """Accuracy over confidence: bars of the model itself, dots of all; on the diagonal a model is calibrated.

    The area of a dot is the share of the items in its bin.
    """
    drawn = axes("Reliability (dots: share of the items)", "confidence", "accuracy")
    own = reliability(everyone[SELF].logits, everyone[SELF].labels)
    width = 1 / len(own.items)
    places = np.arange(len(own.items)) * width
    drawn.bar(places, own.accuracy.nan_to_num(), width, align="edge", color="C0", alpha=0.3)
    drawn.axline((0, 0), slope=1, color="grey")
    for number, (name, answers) in enumerate(everyone.items()):
        confidence, right, count = (values.numpy() for values in reliability(answers.logits, answers.labels))
        error = calibration_error(answers.logits, answers.labels)
        areas = 20 + 300 * count / len(answers.labels)
        some = count > 0
        label = f"{plain(name)}, ECE {error:.3f}"
        drawn.scatter(confidence[some], right[some], areas[some], color=f"C{number}", label=label)
    drawn.set(xlim=(0, 1), ylim=(0, 1))
    drawn.legend(loc="upper left")
    return picture(drawn)


def against(everyone: Mapping[str, Answers], label: str, costs: Mapping[str, float]) -> Image.Image:
    """Accuracy over a cost of each model."""
    drawn = axes(f"Accuracy and {label.partition(',')[0]}", label, "accuracy")
    for name, answers in everyone.items():
        words = f"{plain(name)}: {answers.accuracy:.3f} at {short(costs[name])}"
        drawn.scatter(max(costs[name], 1e-9), answers.accuracy, 80, label=words)
    drawn.set_xscale("log")
    drawn.margins(0.15)
    drawn.legend()
    return picture(drawn)


def by_column(everyone: Mapping[str, Answers], column: str) -> Image.Image:
    """Accuracy over the values of a column, a line for each model."""
    drawn = axes(f"Accuracy by {plain(column)}", plain(column), "accuracy")
    for name, answers in everyone.items():
        line = answers.by(column)
        drawn.plot(list(line), list(line.values()), marker="o", label=plain(name))
    drawn.set(ylim=(0, 1))
    drawn.legend()
    return picture(drawn)


def as_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    return values.float() / 127.5 - 1

"""Figures of a classifier's answers. Pure functions of tensors: `logits` (N, K), `labels` (N,)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, *, top: int = 1) -> float:
    """Share of items whose label is among the `top` highest logits."""
    return float((logits.topk(top, dim=1).indices == labels[:, None]).any(1).double().mean())


def worst_class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The lowest accuracy over the classes that occur: a class that fails altogether hardly shows in the mean."""
    correct = logits.argmax(1) == labels
    return min(float(correct[labels == label].double().mean()) for label in labels.unique())


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats."""
    return float(F.cross_entropy(logits.double(), labels))


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equally wide bins of confidence."""
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    index = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index.cpu(), (correct - confidence).cpu())
    return float(gap.abs().sum() / len(labels))


class Reliability(NamedTuple):
    """By equally wide bins of confidence: mean confidence, accuracy and number of the items, each (bins,) float64."""

    confidence: Tensor
    accuracy: Tensor
    items: Tensor


def reliability(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """What a reliability diagram shows, over the bins of `calibration_error`; NaN in a bin without items."""
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    items = torch.bincount(index, minlength=bins).double()
    right = (predicted == labels).double()
    sums = [torch.bincount(index, values, bins) for values in (confidence, right)]
    return Reliability(sums[0] / items, sums[1] / items, items)


def risk_coverage_area(logits: Tensor, labels: Tensor) -> float:
    """Area under the risk-coverage curve: mean error rate among the k surest answers, over k = 1 … N; 0 is perfect.

    Geifman & El-Yaniv 2017, arXiv 1705.08500. Equally sure answers share the error rate of all of them.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    values, place, counts = confidence.unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros_like(values).index_add_(0, place, (predicted != labels).double())
    by_item = (wrong / counts)[place[confidence.argsort(descending=True, stable=True)]]
    return float((by_item.cumsum(0) / torch.arange(1, len(labels) + 1, device=labels.device)).mean())


def group_accuracy(logits: Tensor, labels: Tensor, group: Collection[int]) -> float:
    """Accuracy among the items whose label is one of `group`; NaN where there are none."""
    inside = torch.isin(labels, torch.tensor(sorted(group), device=labels.device))
    return float((logits.argmax(1) == labels)[inside].double().mean())


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, K) counts: row = label, column = prediction."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def total_variation(labels_a: Tensor, labels_b: Tensor, num_classes: int) -> float:
    """Total variation distance between the class histograms of two sets, 0 (equal) to 1 (disjoint)."""
    a, b = (
        torch.bincount(labels, minlength=num_classes).double() / len(labels)
        for labels in (labels_a, labels_b)
    )
    return float((a - b).abs().sum() / 2)

"""Distances of a student field from its teacher, at shared samples and in the pixels that they add up to (PVD).

    d(a, b) = mean (a - b)^2,   or the Frobenius norm ||a - b|| over the whole batch, as in the official code
    feature = d([l, geo]_s, [l, geo]_t),   density = d(l_s, l_t),   color = d(c_s, c_t),   pixel = d(C_s, C_t)

with l the log-density clipped to a range: a density spans four decades and would drown everything else.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distill_core.config import Config

Reduction = Literal["mean", "norm"]


class FieldView(NamedTuple):
    """A field's outputs along rays; None for those not asked for."""

    log_density: Tensor  # (M,), clipped for the comparison
    geo: Tensor  # (M, F)
    radiance: Tensor | None = None  # (M, C)
    weights: Tensor | None = None  # (M,), of the samples in their rays' pixels
    pixels: Tensor | None = None  # (R, C), over the background


class LossWeights(Config):
    """Weight of each term. That of `feature` is multiplied by `feature_decay` at every step, from step 0 on."""

    feature: float = Field(ge=0)
    feature_decay: float = Field(gt=0, le=1)
    density: float = Field(ge=0)
    color: float = Field(ge=0)
    pixel: float = Field(ge=0)
    late: float = Field(ge=0)  # factor of density and color once pixels are compared


DEFAULT_WEIGHTS: dict[str, LossWeights] = {
    "mean": LossWeights(feature=1.0, feature_decay=0.98, density=0.1, color=1.0, pixel=10.0, late=0.1),
    # Official. They mean what they mean at about 1e5 samples per step: a norm grows with the root of their number.
    "norm": LossWeights(feature=2e-3, feature_decay=0.995, density=2e-3, color=2e-3, pixel=1.0, late=1.0),
}


def distance(student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    """Scalar d(student, teacher); 0, with a gradient of 0, where there is nothing to compare."""
    difference = student - teacher
    if reduction == "norm":
        length: Tensor = difference.norm()
        return length
    return difference.square().sum() / max(difference.numel(), 1)


def distillation_terms(
    student: FieldView, teacher: FieldView, reduction: Reduction, *, feature: bool, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """Terms by name, without weights: the feature if asked for, density and colour, pixels, as far as both show them.

    `kept` (M,) bool: the samples whose feature, density and colour count; None: all. Pixels always count.
    """
    chosen = slice(None) if kept is None else kept
    terms: dict[str, Tensor] = {}
    if feature:
        own, taught = (
            torch.cat([view.log_density[:, None], view.geo], -1)[chosen] for view in (student, teacher)
        )
        terms["feature"] = distance(own, taught, reduction)
    if student.radiance is not None and teacher.radiance is not None:
        terms["density"] = distance(student.log_density[chosen], teacher.log_density[chosen], reduction)
        terms["color"] = distance(student.radiance[chosen], teacher.radiance[chosen], reduction)
    if student.pixels is not None and teacher.pixels is not None:
        terms["pixel"] = distance(student.pixels, teacher.pixels, reduction)
    return terms


def weighted_sum(terms: dict[str, Tensor], weights: LossWeights, step: int) -> Tensor:
    """The loss at `step`; what the terms contain says which stage it is."""
    late = weights.late if "pixel" in terms else 1.0
    factors = {
        "feature": weights.feature * weights.feature_decay**step,
        "density": weights.density * late,
        "color": weights.color * late,
        "pixel": weights.pixel,
    }
    return torch.stack([factors[name] * value for name, value in terms.items()]).sum()

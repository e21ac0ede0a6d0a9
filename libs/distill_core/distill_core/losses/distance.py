"""Distances (B,) of two batches (B, ...), per item: what consistency and rectified-flow methods compare points by.

l2            mean (a - b)^2
huber         mean sqrt((a - b)^2 + c^2) - c             by element; c = 0.001 (LCM)
huber_norm    (sqrt(|a - b|^2 + (c d)^2) - c d) / d      of all d elements; c = 0.00054 (RF++, consistency models)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Distance = Literal["l2", "huber", "huber_norm"]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference, (B,)."""
    return _squares(a, b).mean(1)


def huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance by element, (B,): quadratic below `c`, the absolute difference above."""
    return ((_squares(a, b) + c**2).sqrt() - c).mean(1)


def huber_norm(a: Tensor, b: Tensor, c: float = 0.00054) -> Tensor:
    """Pseudo-Huber distance of whole items over their number of elements, (B,)."""
    squares = _squares(a, b)
    scale = c * squares.shape[1]
    return ((squares.sum(1) + scale**2).sqrt() - scale) / squares.shape[1]


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": l2,
    "huber": huber,
    "huber_norm": huber_norm,
}


def truncated_snr(sigma: Tensor) -> Tensor:
    """Weight max(1 / sigma^2, 1) of |x0 - x0_hat|^2 (Salimans & Ho 2022): the larger of x0's error and the noise's."""
    return (sigma**-2).clamp_min(1)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().flatten(1)

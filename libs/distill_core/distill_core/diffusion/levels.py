"""Noise levels of a batch: one for each item (B,), or one for each frame of each video (B, F)."""

from __future__ import annotations

from torch import Tensor


def expand(level: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, …), or (B, F) as (B, F, 1, …), to broadcast against `like`: (B, …), for videos (B, F, …)."""
    return level.reshape(*level.shape, *[1] * (like.ndim - level.ndim))


def mean_by_level(values: Tensor, level: Tensor) -> Tensor:
    """Mean of `values` (B, …) or (B, F, …) over all that shares a level; the shape is that of `level`."""
    return values.flatten(level.ndim).mean(-1)

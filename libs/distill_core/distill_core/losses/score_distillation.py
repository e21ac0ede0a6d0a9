"""Score distillation: where a diffusion model wants a picture to go (SDS), and where an edit of it differs (DDS).

    g_SDS = eps(x_sigma, y) - e                                  = (x0 - D(x_sigma, y)) / sigma
    g_DDS = eps(x_sigma, y_target) - eps(s_sigma, y_source)      = g_SDS(x0, y_target) - g_SDS(s0, y_source)
    x_sigma = x0 + sigma e,   s_sigma = s0 + sigma e             with one noise e and one level for both

Poole et al. 2022 (arXiv 2209.14988); Hertz et al. 2023, Delta Denoising Score (arXiv 2304.07090), weight 1 on eps.
What both terms of DDS want regardless of the words (blur, saturation) cancels, the more the nearer x0 is to the source.
`surrogate_loss(x0, g)` of losses/matching.py is the scalar whose gradient g is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.diffusion.levels import expand

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_sigma, sigma) -> x0, under its own words and guidance


class Source(NamedTuple):
    """Source of an edit: the image (B, ...), and the model under the words that describe it."""

    x0: Tensor
    predict: Predict


def sds_direction(x0: Tensor, predicted_x0: Tensor, sigma: Tensor) -> Tensor:
    """g_SDS (B, ...) from the prediction at x0 + sigma e; `sigma` (B,). A step of `x0` along -g makes it likelier."""
    return (x0 - predicted_x0) / expand(sigma, x0)


@torch.no_grad()
def score_direction(
    x0: Tensor, predict: Predict, sigma: Tensor, noise: Tensor, source: Source | None = None
) -> Tensor:
    """g_DDS of `x0` (B, ...) against `source`, or g_SDS without one; `noise` like x0, `sigma` (B,); no gradient."""
    added = expand(sigma, x0) * noise
    direction = sds_direction(x0, predict(x0 + added, sigma), sigma)
    if source is None:
        return direction
    return direction - sds_direction(source.x0, source.predict(source.x0 + added, sigma), sigma)

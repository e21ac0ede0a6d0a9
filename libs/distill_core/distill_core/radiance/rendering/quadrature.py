"""Volume rendering: C = sum_i T_i alpha_i c_i + (1 - sum_i T_i alpha_i) background (NeRF, Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.radiance.rendering.march import Samples


def render_weights(density: Tensor, delta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Weight of each sample on its ray (NeRF, Eq. 3) and the transmittance before it, both (R, S).

    `density` (R, S) in 1/unit, `delta` (R, S) in units. The weights sum to the ray's opacity, in [0, 1].
    """
    optical_depth = density * delta
    transmittance = torch.exp(-(optical_depth.cumsum(-1) - optical_depth))  # light left *before* each sample
    return transmittance * -torch.expm1(-optical_depth), transmittance


def packed_weights(density: Tensor, samples: Samples) -> Tensor:
    """`render_weights` of packed samples: density (M,) to weights (M,).

    Goes through a dense (R, S) table: a running sum over all rays at once would lose digits in fp32.
    """
    if len(density) == 0:
        return density.float()
    dense = density.new_zeros(samples.num_rays, int(samples.rank.max()) + 1, dtype=torch.float32)
    dense = dense.index_put((samples.ray, samples.rank), density.float())
    weights, _ = render_weights(dense, samples.delta)
    return weights[samples.ray, samples.rank]


def composite(weights: Tensor, channels: Tensor, samples: Samples) -> Tensor:
    """Weighted sum of `channels` (M, C) along each ray: (R, C) in fp32, 0 for rays without samples."""
    out = torch.zeros(samples.num_rays, channels.shape[-1], device=channels.device)
    return out.index_add(0, samples.ray, weights[:, None] * channels.float())


def over(colour: Tensor, opacity: Tensor, background: Tensor) -> Tensor:
    """`colour` (..., 3), already multiplied by `opacity` (..., 1), laid over `background` (..., 3)."""
    return colour + (1 - opacity) * background

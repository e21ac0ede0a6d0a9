"""Structural similarity as a loss (Wang et al. 2004): Gaussian window 11x11, sigma 1.5, K 0.01, 0.03, range 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim_map(one: Tensor, other: Tensor) -> Tensor:
    """SSIM (B, C, H - 10, W - 10) of pictures (B, C, H, W) in [0, 1], at windows that lie inside them."""
    axis = torch.arange(WINDOW, dtype=one.dtype, device=one.device) - WINDOW // 2
    line = torch.exp(-axis.square() / (2 * SIGMA**2))
    line = line / line.sum()
    window = (line[:, None] * line)[None, None]

    def mean(values: Tensor) -> Tensor:
        means: Tensor = F.conv2d(values.flatten(0, 1)[:, None], window).unflatten(0, values.shape[:2])
        return means.squeeze(2)

    a, b = mean(one), mean(other)
    var_a, var_b, cov = mean(one * one) - a * a, mean(other * other) - b * b, mean(one * other) - a * b
    return ((2 * a * b + C1) * (2 * cov + C2)) / ((a * a + b * b + C1) * (var_a + var_b + C2))


def photometric_loss(predicted: Tensor, target: Tensor, ssim_weight: float = 0.2) -> Tensor:
    """(1 - w) L1 + w (1 - SSIM) of pictures (B, C, H, W) in [0, 1] (3D Gaussian splatting, Eq. 7; w = 0.2)."""
    absolute = (predicted - target).abs().mean()
    if ssim_weight == 0:
        return absolute
    return (1 - ssim_weight) * absolute + ssim_weight * (1 - ssim_map(predicted, target).mean())

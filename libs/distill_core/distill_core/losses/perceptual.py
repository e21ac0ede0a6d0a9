"""Perceptual distance of two pictures by the features that a network makes of them (after DISTS, arXiv 2004.07728).

    texture   l = (2 m_x m_y + c) / (m_x^2 + m_y^2 + c),      m: mean of a channel over the picture
    structure s = (2 v_xy + c) / (v_x + v_y + c),             v: its variance and covariance
    distance  = 1 - mean over maps and channels of (l + s) / 2

Differs from DISTS: every channel weighs the same, no weights were learned from people's ratings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STABILISER = 1e-6


def structure_texture_distance(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Distance (scalar), 0 for equal ones, of two lists of feature maps (B, D, h, w), layer by layer."""
    alike = [
        _similarity(a.float().flatten(2), b.float().flatten(2)) for a, b in zip(maps, targets, strict=True)
    ]
    return 1 - torch.stack(alike).mean()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean similarity of channels, (B, D, N) each."""
    mean_a, mean_b = a.mean(2), b.mean(2)
    var_a, var_b = a.var(2, correction=0), b.var(2, correction=0)
    covariance = (a * b).mean(2) - mean_a * mean_b
    texture = (2 * mean_a * mean_b + STABILISER) / (mean_a**2 + mean_b**2 + STABILISER)
    structure = (2 * covariance + STABILISER) / (var_a + var_b + STABILISER)
    return (texture + structure).mean() / 2


def unit_feature_distance(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Distance (B,) of two lists of feature maps (B, D, h, w): LPIPS without its learned weights (arXiv 1801.03924).

    Over the channels of each place the features have the length 1; squared differences are summed over the channels,
    averaged over the places and summed over the layers.
    """
    layers = [
        (_unit(a.float()) - _unit(b.float())).square().sum(1).flatten(1).mean(1)
        for a, b in zip(maps, targets, strict=True)
    ]
    return torch.stack(layers).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + STABILISER).sqrt()

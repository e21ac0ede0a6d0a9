"""Figures of edits: the change of what was to change, and of the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SURE = 0.9  # a pixel belongs to the object when this share of it does
MARGIN = 4  # pixels around the object that count neither as it nor as background


def colour_moved(before: Tensor, after: Tensor, wanted: Tensor, shown: Tensor) -> float:
    """Share of the way from the object's mean colour `before` to that `wanted`; 1 is all of it.

    Pictures (N, H, W, 3); `shown` (N, H, W), of each pixel: the object.
    """
    inside = shown > SURE
    start, end, goal = (pictures[inside].mean(0) for pictures in (before, after, wanted))
    way = goal - start
    return float(((end - start) * way).sum() / way.square().sum().clamp_min(1e-12))


def background_psnr(before: Tensor, after: Tensor, shown: Tensor, margin: int = MARGIN) -> float:
    """PSNR in dB of the pixels that lie `margin` pixels or more from the object, against the pictures before."""
    near = F.max_pool2d(shown[:, None], 2 * margin + 1, stride=1, padding=margin)[:, 0] > 0
    error = (after - before)[~near].square().mean()
    return float(-10 * torch.log10(error.clamp_min(1e-10)))

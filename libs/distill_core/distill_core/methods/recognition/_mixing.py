"""Mixtures of pictures and of their labels, drawn from torch's global generator, which the loop seeds by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def random_share(alpha: float) -> float:
    """A share from Beta(alpha, alpha)."""
    return float(torch.distributions.Beta(alpha, alpha).sample())


def random_box(height: int, width: int, share: float) -> Box:
    """A box inside (height, width) of about that share of its area, of its own aspect."""
    rows, columns = (round(side * math.sqrt(share)) for side in (height, width))
    top = int(torch.randint(height - rows + 1, ()))
    left = int(torch.randint(width - columns + 1, ()))
    return top, left, rows, columns


def pasted(x0: Tensor, other: Tensor, box: Box) -> tuple[Tensor, float]:
    """Pictures (B, C, H, W) with the box of `other` in its place, and the share of the area that is left of them."""
    top, left, rows, columns = box
    mixed = x0.clone()
    mixed[:, :, top : top + rows, left : left + columns] = other[
        :, :, top : top + rows, left : left + columns
    ]
    return mixed, 1 - rows * columns / (x0.shape[2] * x0.shape[3])


def mixed_batch(x0: Tensor, target: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each picture (B, C, H, W) mixed with that of the other end of the batch, and targets (B, K) by the same share.

    Half of the batches by mixup, half by cutmix; only one where the other's alpha is 0, none where both are.
    """
    if not mixup and not cutmix:
        return x0, target
    by_box = bool(cutmix) and (not mixup or float(torch.rand(())) < 0.5)
    share = random_share(cutmix if by_box else mixup)
    if by_box:
        x0, share = pasted(x0, x0.flip(0), random_box(x0.shape[2], x0.shape[3], 1 - share))
    else:
        x0 = share * x0 + (1 - share) * x0.flip(0)
    return x0, share * target + (1 - share) * target.flip(0)

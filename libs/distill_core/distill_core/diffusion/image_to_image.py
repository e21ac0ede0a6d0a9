"""Sampling that starts from an image: editing, inpainting, super-resolution. Needs no training, suits every sampler.

    x_sigma = y + sigma z          begin at a lower level than pure noise (SDEdit, Meng et al. 2021, arXiv 2108.01073)
    x0     <- x0 + A+ (y - A x0)   what is known of the picture stays (DDNM, Wang et al. 2022, arXiv 2212.00490)

A is the mask of known pixels (inpainting) or the mean over blocks (super-resolution); A A+ = 1, so A x0 = A y exactly.
Arithmetic operators only: torch tensors and NumPy arrays alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Array = Any


@dataclass(frozen=True, eq=False)
class InitImage:
    """The init image `y` that sampling starts from, in the network's own space."""

    y: Array  # (B, C, H, W)
    strength: float  # share of the steps that is done, in (0, 1]; 1 is all of them
    known: Array | None = None  # (B, 1, H, W): 1 where y stays, 0 where it is made anew
    block: int = 1  # y's means over so many pixels a side stay

    def levels(self, levels: list[float]) -> list[float]:
        """The last `strength` of the levels, at least one."""
        return levels[-max(1, math.ceil(self.strength * len(levels) - 1e-9)) :]

    def start(self, noise: Array, sigma: float) -> Array:
        """The first x_sigma; nothing of y is left where it is made anew."""
        y = self.y if self.known is None else self.y * self.known
        return y + noise * sigma

    def restore(self, x0: Array) -> Array:
        """x0 with what is known of y put back."""
        if self.known is not None:
            x0 = x0 + self.known * (self.y - x0)
        if self.block > 1:
            batch, channels, height, width = x0.shape
            cells = batch, channels, height // self.block, self.block, width // self.block, self.block
            missing = (self.y - x0).reshape(cells).mean((3, 5))
            x0 = (x0.reshape(cells) + missing[:, :, :, None, :, None]).reshape(x0.shape)
        return x0

"""Small pictures at the size of the large one, as networks are shown them beside a noised sample."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.diffusion.super_resolution import LOW_RESOLUTION
from distill_core.errors import ConfigError


def enlarge(low: Tensor, picture: tuple[int, int, int]) -> Tensor:
    """Small pictures (B, C, h, w) at the size of `picture` (C, H, W), bilinear.

    Raises:
        ConfigError: their sides are not the same whole fraction of the large ones, or they have other channels.
    """
    channels, height, width = picture
    _, given, high, wide = low.shape
    factor = height // max(high, 1)
    if given != channels or factor < 1 or (high * factor, wide * factor) != (height, width):
        raise ConfigError(
            f"{LOW_RESOLUTION} has pictures of {wide} x {high} pixels and {given} channels, which do not divide "
            f"{width} x {height} and {channels} channels; give a half, a quarter … of that size",
            field=LOW_RESOLUTION,
        )
    size = (height, width)
    return torch.nn.functional.interpolate(low, size=size, mode="bilinear", align_corners=False)

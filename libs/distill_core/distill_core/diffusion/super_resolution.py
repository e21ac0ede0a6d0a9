"""Low-resolution pictures as a condition: what a network that enlarges is shown beside the noised sample.

shrink(x, f) is the mean over blocks of f x f pixels; enlarge(y) is its bilinear interpolation at the large size. Of
factors that divide each other, shrink(x, f g) = shrink(shrink(x, f), g): a smaller picture follows from a larger one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.errors import ConfigError

LOW_RESOLUTION = "low_resolution"  # the condition's name: pictures (B, C, h, w) in [-1, 1]


def small_shape(
    picture: tuple[int, int, int], factor: int, *, field: str = LOW_RESOLUTION
) -> tuple[int, int, int]:
    """(C, h, w) of the small picture that belongs to `picture` (C, H, W).

    Raises:
        ConfigError: sides that the factor does not divide.
    """
    channels, height, width = picture
    if height % factor or width % factor:
        raise ConfigError(
            f"pictures of {width} x {height} pixels do not divide by the factor {factor} of {field}; choose one that "
            "divides both sides, or pictures of another size",
            field=field,
        )
    return channels, height // factor, width // factor


def shrink(x: Tensor, factor: int) -> Tensor:
    """Means (B, C, h, w) over blocks of `factor` x `factor` pixels of pictures (B, C, H, W).

    Raises:
        ConfigError: sides that the factor does not divide.
    """
    small_shape((x.shape[1], x.shape[2], x.shape[3]), factor)
    return torch.nn.functional.avg_pool2d(x, factor)


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

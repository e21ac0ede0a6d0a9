"""Preprocessing of pictures as the networks of other libraries were trained with it: resized, cropped, normalised.

Pillow resizes 8-bit pictures in two passes, along rows and along columns, and rounds after each. Here both are products
with Pillow's own fixed-point weights, so the same picture comes out, on any device, and gradients pass the rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.config import Config

Side = Annotated[int, Field(ge=1, le=1024)]
FIXED_POINT = 2.0**22  # of Pillow's weights for 8-bit pictures


class Preprocessing(Config):
    """What becomes of a picture before a network sees it; with nothing set, it stays as it is."""

    resize: Side | tuple[Side, Side] | None = None  # shorter side, or (height, width), pixels
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"  # filter of Pillow
    crop: tuple[Side, Side] | None = None  # centre that is kept, (height, width), pixels
    rescale: float = Field(1 / 255, gt=0)  # factor of the levels 0 to 255
    mean: tuple[float, ...] = (0.5,)  # subtracted after that, of each channel or of all
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)  # and divided by

    @model_validator(mode="after")
    def _per_channel(self) -> Self:
        if not self.mean or not self.std:
            raise ValueError("mean and std need a number for each channel, or one for all")
        if isinstance(self.resize, int) and self.crop is None:
            raise ValueError(
                f"resize = {self.resize} alone leaves pictures as wide as they were beside it; give (height, width), "
                "or the crop that is kept"
            )
        inside = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if inside and self.crop and (self.crop[0] > inside[0] or self.crop[1] > inside[1]):
            raise ValueError(f"crop = {self.crop} is larger than resize = {self.resize} makes pictures")
        return self

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that the network sees of a picture of this size."""
        return self.crop or self._resized(height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if not isinstance(self.resize, int):
            return self.resize
        short, long = sorted((height, width))
        longer = int(self.resize * long / short)
        return (self.resize, longer) if height <= width else (longer, self.resize)

    def fits(self, channels: int) -> bool:
        """Whether there is a mean and a deviation for each of so many channels."""
        return {len(self.mean), len(self.std)} <= {1, channels}


class Preprocessed(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] to what a network takes."""

    def __init__(self, config: Preprocessing) -> None:
        super().__init__()
        self.config = config
        self.same = config == Preprocessing()

    def forward(self, image: Tensor) -> Tensor:
        if self.same:
            return image
        levels = (image + 1) * 127.5
        levels = cropped(self.resized(levels), self.config.crop)
        mean, std = (levels.new_tensor(v).view(-1, 1, 1) for v in (self.config.mean, self.config.std))
        return (levels * self.config.rescale - mean) / std

    def resized(self, levels: Tensor) -> Tensor:
        """Levels 0 to 255 of the size that the configuration says, whole numbers where the size changes."""
        height, width = self.config._resized(*levels.shape[-2:])
        if (height, width) == tuple(levels.shape[-2:]):
            return levels
        rows, columns = levels.shape[-2:]
        level = _rounded(levels.double())
        columns_first = height < rows and rows - height > 2 * (columns - width)  # as Pillow 13 does
        if columns_first:
            level = self._wide(self._high(level, height), width)
        else:
            level = self._high(self._wide(level, width), height)
        return level.to(levels.dtype)

    def _wide(self, level: Tensor, width: int) -> Tensor:
        before = level.shape[-1]
        return level if width == before else _rounded(level @ self._weights(before, width, level))

    def _high(self, level: Tensor, height: int) -> Tensor:
        return self._wide(level.transpose(-1, -2), height).transpose(-1, -2)

    def _weights(self, before: int, after: int, like: Tensor) -> Tensor:
        return torch.tensor(
            weights(before, after, self.config.resample), dtype=like.dtype, device=like.device
        )


def cropped(image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The centre of pictures, (height, width); what is odd is left out at the bottom and on the right."""
    if size is None:
        return image
    top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
    return image[..., top : top + size[0], left : left + size[1]]


def _rounded(levels: Tensor) -> Tensor:
    """Whole levels from 0 to 255; the gradient is that of the levels before."""
    return levels + (torch.floor(levels + 0.5).clamp(0, 255) - levels).detach()


@functools.lru_cache(maxsize=64)
def weights(before: int, after: int, resample: str) -> np.ndarray:
    """Weights (before, after) with which Pillow makes `after` pixels of `before`."""
    radius, kernel = FILTERS[resample]
    scale = before / after
    stretch = max(scale, 1.0)
    found = np.zeros((before, after))
    for place in range(after):
        centre = (place + 0.5) * scale
        first = max(int(centre - radius * stretch + 0.5), 0)
        last = min(int(centre + radius * stretch + 0.5), before)
        values = np.array([kernel((at - centre + 0.5) / stretch) for at in range(first, last)])
        values = values / values.sum() * FIXED_POINT
        found[first:last, place] = np.trunc(values + np.copysign(0.5, values)) / FIXED_POINT
    return found


def _bilinear(x: float) -> float:
    return max(1 - abs(x), 0.0)


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)


FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {
    "bilinear": (1.0, _bilinear),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}

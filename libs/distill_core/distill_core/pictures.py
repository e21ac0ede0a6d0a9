"""Tensors as picture files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] as (B, H, W, C) uint8, rounded."""
    scaled = (pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def sheet(pictures: Tensor, *, columns: int = 10, gap: int = 1, min_side: int = 32) -> Image.Image:
    """A grid of pictures; small ones are enlarged by whole factors so that people can see them."""
    arrays = to_uint8(pictures)
    arrays = arrays.repeat(3, axis=3) if arrays.shape[3] == 1 else arrays[..., :3]
    factor = max(1, math.ceil(min_side / arrays.shape[1]))
    arrays = arrays.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = arrays.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, array in enumerate(arrays):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = array
    return Image.fromarray(canvas)


def save_sheet(pictures: Tensor, path: Path) -> None:
    """`sheet` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(path)

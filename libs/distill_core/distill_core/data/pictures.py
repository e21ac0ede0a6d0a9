"""Encoded pictures (PNG, JPEG, WebP, BMP, TIFF) as tensors: decoded once if they fit, else on demand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill_core.data.damaged import MAX_NAMED, say_skipped, together
from distill_core.data.source import to_unit
from distill_core.errors import DataError
from distill_core.pictures import on_white, read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
IN_MEMORY_BYTES = 2**30
Encoded = Callable[
    [int], tuple[Path | bytes, str]
]  # item -> its file or bytes, and what to call it in an error


class EncodedPixels:
    """Pictures of one shape behind `encoded(index)`.

    Args:
        encoded: gives a picture's file or bytes and its name.
        count: how many there are.
        size: every picture is scaled to a shorter side of `size`, then cropped to its centre; unset: all
            must have the first one's size already.
        channels: 1 (grey) or 3 (RGB); unset: as the first picture, and all must agree.
        skip_damaged: leave out those that cannot be read; `readable` says which ones are left.

    Raises:
        DataError: pictures that cannot be read, or that differ from the first one; the message names them.
    """

    shape: tuple[int, int, int]

    def __init__(
        self,
        encoded: Encoded,
        count: int,
        *,
        size: int | None,
        channels: int | None,
        skip_damaged: bool = False,
    ) -> None:
        self._encoded, self._size, self._channels = encoded, size, channels
        self._kept: Tensor | None = None
        self.readable = torch.arange(count)
        self._look(count, skip_damaged)
        self.skipped = count - len(self.readable)

    def __len__(self) -> int:
        return len(self.readable)

    def take(self, indices: Tensor) -> Tensor:
        if self._kept is not None:
            return to_unit(self._kept[indices])
        return to_unit(torch.stack([self._checked(index) for index in self.readable[indices].tolist()]))

    def _look(self, count: int, skip_damaged: bool) -> None:
        """Read the pictures once, to keep them if they fit, and to find all that cannot be used.

        A set that does not fit is read no further than its first picture, unless damaged ones are to be left out.
        """
        kept: Tensor | None = None
        good: list[int] = []
        damaged: list[DataError] = []
        for index in range(count):
            picture = self._tried(index, damaged)
            if picture is None:
                if not skip_damaged and len(damaged) == MAX_NAMED:
                    raise together(damaged, count, looked_at=index + 1)
                continue
            if not good:
                self.shape = tuple(picture.shape)  # type: ignore[assignment]
                fits = count * math.prod(self.shape) <= IN_MEMORY_BYTES
                kept = torch.empty(count, *self.shape, dtype=torch.uint8) if fits else None
            if kept is None and not skip_damaged and not damaged:
                return
            self._refuse_other(picture, index)
            if kept is not None:
                kept[len(good)] = picture
            good.append(index)
        if damaged and (not skip_damaged or not good):
            raise together(damaged[:MAX_NAMED], count, looked_at=count)
        if damaged:
            say_skipped(damaged, count)
        self.readable = torch.tensor(good)
        self._kept = None if kept is None else kept[: len(good)]

    def _tried(self, index: int, damaged: list[DataError]) -> Tensor | None:
        try:
            return self._decode(index)
        except DataError as error:
            damaged.append(error)
            return None

    def _decode(self, index: int) -> Tensor:
        data, name = self._encoded(index)
        return decode(data, name, size=self._size, channels=self._channels)

    def _checked(self, index: int) -> Tensor:
        picture = self._decode(index)
        self._refuse_other(picture, index)
        return picture

    def _refuse_other(self, picture: Tensor, index: int) -> None:
        """Raise if the picture's shape is not that of the first."""
        if tuple(picture.shape) == self.shape:
            return
        name = self._encoded(index)[1]
        (channels, height, width), (c, h, w) = picture.shape, self.shape
        if channels != c:
            raise DataError(
                f"picture {name} has {channels} channels, the first has {c}; set data.channels to 1 or 3",
                field="data.channels",
            )
        raise DataError(
            f"picture {name} is {width}x{height} where the first is {w}x{h}; "
            "set data.size to scale and crop all of them to one size",
            field="data.size",
        )


def decode(data: Path | bytes, name: str, *, size: int | None = None, channels: int | None = None) -> Tensor:
    """One picture as (C, H, W) uint8, transparency put on white and the camera's rotation mark applied."""
    picture = on_white(read_image(data, f"picture {name}"))
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    grey = picture.mode == "L" if channels is None else channels == 1
    values = np.array(picture.convert("L" if grey else "RGB"))
    return torch.from_numpy(values[None] if grey else values.transpose(2, 0, 1).copy())

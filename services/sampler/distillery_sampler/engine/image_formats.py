"""Pictures as bytes. Encoding takes as long as a small network, so callers do it beside the model thread."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

from distill_core.errors import ConfigError
from distill_core.pictures import read_image

Format = Literal["RAW_U8", "PNG", "JPEG", "WEBP"]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_OPTIONS: dict[str, dict[str, object]] = {
    "PNG": {"compress_level": 1},  # level 6 takes twice as long for 5 % less
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True, "method": 0},
}


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """A float picture (C, H, W) in [-1, 1] as uint8 (H, W, C)."""
    scaled = np.rint((np.clip(picture, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(1, 2, 0))


def rgb_to_uint8(rgb: np.ndarray) -> np.ndarray:
    """A rendered picture (H, W, 3) in [0, 1] as uint8."""
    return np.ascontiguousarray(np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8))


def check_format(channels: int, image_format: Format) -> None:
    """Refuse a format that cannot hold so many channels."""
    if image_format != "RAW_U8" and (channels not in _MODES or (channels == 4 and image_format == "JPEG")):
        raise ConfigError(
            f"{image_format} cannot hold pictures of {channels} channels; ask for RAW_U8",
            field="image_format",
        )


def encode(pixels: np.ndarray, image_format: Format) -> bytes:
    """The bytes of a uint8 picture (H, W, C)."""
    if image_format == "RAW_U8":
        return pixels.tobytes()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format=image_format, **_OPTIONS[image_format])
    return buffer.getvalue()


def decode(data: bytes, image_format: Format, shape: tuple[int, int, int]) -> np.ndarray:
    """The uint8 picture (H, W, C) of `encode`'s bytes; the inverse except for JPEG, which loses a little."""
    if image_format == "RAW_U8":
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    picture = read_image(data, "the answer's picture", formats=[image_format])
    return np.asarray(picture.convert(_MODES[shape[2]])).reshape(shape)

"""Low-resolution pictures as a condition: what a network that enlarges is told of the picture.

shrink(x, f) is the mean over blocks of f x f pixels, so that shrink(x, f g) = shrink(shrink(x, f), g): of factors that
divide each other, a smaller picture follows from a larger one. Torch tensors and NumPy arrays alike.
"""

from __future__ import annotations

from typing import Any

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
            f"pictures of {width} x {height} pixels do not divide by {factor}, of which {field} speaks; choose a "
            "factor that divides both sides, or pictures of another size",
            field=field,
        )
    return channels, height // factor, width // factor


def shrink(x: Any, factor: int) -> Any:
    """Means (B, C, h, w) over blocks of `factor` x `factor` pixels of pictures (B, C, H, W).

    Raises:
        ConfigError: sides that the factor does not divide.
    """
    batch, channels, height, width = x.shape
    _, high, wide = small_shape((channels, height, width), factor)
    return x.reshape(batch, channels, high, factor, wide, factor).mean((3, 5))

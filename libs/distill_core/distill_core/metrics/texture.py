"""Figures of textures: whether they repeat without a seam, how fine they are, and how alike two sets of them are."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.errors import DataError
from distill_core.losses.frequency import CUTOFF, high_pass
from distill_core.metrics.frechet import frechet_distance

LAGS = tuple(  # (down, right) in pixels: four directions, three distances
    (down * distance, right * distance)
    for distance in (1, 2, 4)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))
)


def seam_ratio(pictures: Tensor) -> float:
    """Mean |difference across the wrap edge| over mean |difference of neighbours inside|, both axes, of (B, C, H, W).

    1 for textures that repeat without a seam; above 1, copies laid side by side show their border.

    Raises:
        DataError: pictures of fewer than 3 pixels a side, not finite, or without any detail inside.
    """
    _check(pictures, at_least=3)
    x = pictures.detach().double()
    across = sum(float((x.select(axis, 0) - x.select(axis, -1)).abs().mean()) for axis in (2, 3))
    inside = sum(float(x.diff(dim=axis).abs().mean()) for axis in (2, 3))
    if inside == 0:
        raise DataError("the pictures are of one colour each, so there is nothing to compare a seam with")
    return across / inside


def high_frequency_energy(pictures: Tensor, cutoff: float = CUTOFF) -> float:
    """Mean square of what (B, C, H, W) hold at radial frequencies above `cutoff` (cycles per pixel).

    A wave of amplitude A above the cutoff gives A^2 / 2.
    """
    _check(pictures, at_least=1)
    return float(high_pass(pictures.detach().double(), cutoff).square().mean())


def high_frequency_ratio(pictures: Tensor, reference: Tensor, cutoff: float = CUTOFF) -> float:
    """`high_frequency_energy` of `pictures` over that of `reference`: below 1, detail was blurred away."""
    energy = high_frequency_energy(reference, cutoff)
    if energy == 0:
        raise DataError(f"the reference pictures hold nothing above {cutoff:g} cycles per pixel")
    return high_frequency_energy(pictures, cutoff) / energy


def texture_distance(pictures: Tensor, reference: Tensor) -> float:
    """Fréchet distance between two sets of textures (N, C, H, W) in `texture_features`; no network is involved."""
    return frechet_distance(texture_features(pictures), texture_features(reference))


def texture_features(pictures: Tensor) -> Tensor:
    """(N, 2 C + 12): mean and spread of each channel, and the variogram of the channels' mean.

    The variogram is the mean |x(p) - x(p + lag)| over the `LAGS`. Only pixels inside the picture are paired: a texture
    is described alike whether or not it repeats.
    """
    _check(pictures, at_least=max(down for down, _ in LAGS) + 1)
    x = pictures.detach().double()
    grey = x.mean(1)
    variogram = [_lagged(grey, down, right).abs().mean((1, 2)) for down, right in LAGS]
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), torch.stack(variogram, 1)], 1)


def _lagged(x: Tensor, down: int, right: int) -> Tensor:
    """Differences of all pixels (N, H, W) that lie `down` and `right` of each other."""
    if right < 0:
        return _lagged(x.flip(2), down, -right)
    height, width = x.shape[1:]
    return x[:, down:, right:] - x[:, : height - down, : width - right]


def _check(pictures: Tensor, *, at_least: int) -> None:
    if pictures.ndim != 4 or min(pictures.shape[2:]) < at_least or not len(pictures):
        raise DataError(
            f"pictures of shape {tuple(pictures.shape)} are not textures to measure: give (N, C, H, W), "
            f"{at_least} pixels or more a side"
        )
    if not pictures.isfinite().all():
        raise DataError("the pictures hold NaN or infinity")

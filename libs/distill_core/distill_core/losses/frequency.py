"""High-frequency content of an image: edges (Sobel), and the frequencies above a cutoff (Fourier).

L_hf = mean | |S(x)| - |S(y)| | + mean |A(x) - A(y)|          (after HiPA, arXiv 2311.18158)

S are the slopes at a pixel, A the amplitudes of the waves above the cutoff, by length. HiPA has published no filters.
Strengths are compared, not signed values: where detail cannot be told from the input, the signed value nearest to all
is a blur. For the strength of single waves the same holds, less so; so those of one length are taken together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CUTOFF = 0.25  # cycles per pixel: half of the highest along an axis
TINY = 1e-12  # under a root, whose slope at 0 would be infinite


def sobel(pictures: Tensor) -> Tensor:
    """Slopes along x, then y, in units per pixel: (B, C, H, W) to (B, 2C, H, W); borders are repeated."""
    padded = F.pad(
        pictures, (1, 1, 1, 1), mode="replicate"
    )  # differences: a convolution takes several times as long
    across, down = _step(padded, 3), _step(padded, 2)
    return torch.cat([_smooth(across, 2), _smooth(down, 3)], 1)


def _step(x: Tensor, axis: int) -> Tensor:
    """Half the difference of the neighbours along an axis, which gets two shorter."""
    size = x.shape[axis] - 2
    return (x.narrow(axis, 2, size) - x.narrow(axis, 0, size)) / 2


def _smooth(x: Tensor, axis: int) -> Tensor:
    """Mean with weights 1, 2, 1 along an axis, which gets two shorter."""
    size = x.shape[axis] - 2
    return (x.narrow(axis, 0, size) + 2 * x.narrow(axis, 1, size) + x.narrow(axis, 2, size)) / 4


def high_pass(pictures: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """`pictures` (B, C, H, W) without what lies at radial frequencies up to `cutoff` (cycles per pixel)."""
    waves = torch.fft.rfft2(pictures) * (_radius(pictures) > cutoff)
    passed: Tensor = torch.fft.irfft2(waves, s=pictures.shape[2:])
    return passed


def edge_strength(pictures: Tensor) -> Tensor:
    """Length of the slope at each pixel, (B, C, H, W) to (B, C, H, W)."""
    along, down = sobel(pictures).chunk(2, 1)
    return (along.square() + down.square() + TINY).sqrt()


def spectrum(pictures: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """Root mean square amplitude of the waves of each length above `cutoff`: (B, C, H, W) to (B, C, rings).

    Rings are one cycle per picture wide. Of noise of variance 1 all have the amplitude 1.
    """
    waves: Tensor = torch.fft.rfft2(pictures, norm="ortho")
    power = (waves.real.square() + waves.imag.square()).flatten(2)
    radius = _radius(pictures).flatten()
    kept = (radius > cutoff).nonzero().squeeze(-1)
    ring = (radius[kept] * max(pictures.shape[2:])).round().long()
    ring = ring - ring.min()
    count = torch.bincount(ring).clamp_min(1)
    total = power.new_zeros(*power.shape[:2], len(count)).index_add(2, ring, power[..., kept])
    return (total / count + TINY).sqrt()


def high_frequency_distance(pictures: Tensor, targets: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """L_hf of two batches (B, C, H, W), a scalar; 0 for equal ones."""
    x, y = pictures.float(), targets.float()
    edges = (edge_strength(x) - edge_strength(y)).abs().mean()
    return edges + (spectrum(x, cutoff) - spectrum(y, cutoff)).abs().mean()


def _radius(pictures: Tensor) -> Tensor:
    """Radial frequency of each coefficient of `rfft2`, (H, W // 2 + 1), cycles per pixel."""
    height, width = pictures.shape[2:]
    rows = torch.fft.fftfreq(height, device=pictures.device)[:, None]
    return torch.hypot(rows, torch.fft.rfftfreq(width, device=pictures.device)[None])

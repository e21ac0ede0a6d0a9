"""What a picture holds beside its slow changes: edges (Sobel), and the frequencies above a cutoff (Fourier).

L_hf = mean | |S(x)| - |S(y)| | + mean | |F_hf x| - |F_hf y| |          (after HiPA, arXiv 2311.18158)

S are the slopes at a pixel, F_hf the Fourier coefficients above the cutoff. HiPA's filters are not published; strengths
are compared, not signed values: where detail cannot be told from the input, the signed one nearest to all is a blur.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CUTOFF = 0.25  # cycles per pixel: half of the highest along an axis
TINY = 1e-12  # under a root, whose slope at 0 would be infinite


def sobel(pictures: Tensor) -> Tensor:
    """Slopes along x, then y, in units per pixel: (B, C, H, W) to (B, 2C, H, W); borders are repeated."""
    smooth, slope = pictures.new_tensor([1.0, 2.0, 1.0]) / 4, pictures.new_tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]
    channels = pictures.shape[1]
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(padded, kernels.repeat(channels, 1, 1, 1), groups=channels)
    return slopes.unflatten(1, (channels, 2)).transpose(1, 2).flatten(1, 2)


def high_pass(pictures: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """`pictures` (B, C, H, W) without what lies at radial frequencies up to `cutoff` (cycles per pixel)."""
    waves = torch.fft.rfft2(pictures) * _above(cutoff, pictures)
    return torch.fft.irfft2(waves, s=pictures.shape[2:])


def edge_strength(pictures: Tensor) -> Tensor:
    """Length of the slope at each pixel, (B, C, H, W) to (B, C, H, W)."""
    along, down = sobel(pictures).chunk(2, 1)
    return (along.square() + down.square() + TINY).sqrt()


def spectrum(pictures: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """Amplitudes of the waves above `cutoff` (cycles per pixel): (B, C, H, W) to (B, C, H, W // 2 + 1), else 0.

    Divided by sqrt(H W), so that noise of variance 1 has amplitudes of mean square 1.
    """
    waves = torch.fft.rfft2(pictures, norm="ortho") * _above(cutoff, pictures)
    return (waves.real.square() + waves.imag.square() + TINY).sqrt()


def high_frequency_distance(pictures: Tensor, targets: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """L_hf of two batches (B, C, H, W), a scalar; 0 for equal ones."""
    x, y = pictures.float(), targets.float()
    edges = (edge_strength(x) - edge_strength(y)).abs().mean()
    return edges + (spectrum(x, cutoff) - spectrum(y, cutoff)).abs().mean()


def _above(cutoff: float, pictures: Tensor) -> Tensor:
    """Which coefficients of `rfft2` lie above the radial frequency `cutoff`, (H, W // 2 + 1) bool."""
    height, width = pictures.shape[2:]
    rows = torch.fft.fftfreq(height, device=pictures.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=pictures.device)[None]
    return torch.hypot(rows, columns) > cutoff

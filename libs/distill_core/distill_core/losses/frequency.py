"""What a picture holds beside its slow changes: edges (Sobel), and the frequencies above a cutoff (Fourier).

L_hf = mean |S(x) - S(y)| + mean |H(x) - H(y)|          (after HiPA, arXiv 2311.18158)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CUTOFF = 0.25  # cycles per pixel: half of the highest along an axis


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
    height, width = pictures.shape[2:]
    rows = torch.fft.fftfreq(height, device=pictures.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=pictures.device)[None]
    kept = torch.hypot(rows, columns) > cutoff
    return torch.fft.irfft2(torch.fft.rfft2(pictures) * kept, s=(height, width))


def high_frequency_distance(pictures: Tensor, targets: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """L_hf of two batches (B, C, H, W), a scalar; 0 for equal ones."""
    difference = pictures.float() - targets.float()  # both filters are linear
    return sobel(difference).abs().mean() + high_pass(difference, cutoff).abs().mean()

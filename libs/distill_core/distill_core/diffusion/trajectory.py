"""Points on a denoiser's trajectories, in the variance-exploding form x_sigma = x0 + sigma eps.

    eps(x, x0; s)             = (x - x0) / s                     what a prediction of x0 says of the noise
    jump(x, x0; s -> e)       = x0 + e eps                       DDIM's transfer: one Euler step of the ODE
    invert_jump(y, x; s -> e) = (y - (e / s) x) / (1 - e / s)    the x0 whose jump from x ends in y
    renoise(x; s -> e)        = x + sqrt(e^2 - s^2) eps',  e > s the forward process from level s on

Levels are (B,), or of a video's frames (B, F); samples are (B, ...). The levels s of a jump are above 0, e may be 0.
In the form alpha x0 + sigma_t eps these are the same maps of x / alpha at the level sigma_t / alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.diffusion.levels import expand

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_sigma, sigma) -> x0; condition and guidance are bound


class Parts(NamedTuple):
    """What a network says of a noised sample: the sample and the noise in it, (B, ...) each."""

    x0: Tensor
    eps: Tensor


def eps_of(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The unit noise (B, ...) that makes `x_sigma` of `x0`."""
    return (x_sigma - x0) / expand(sigma, x_sigma)


def parts(denoise: Denoise, x_sigma: Tensor, sigma: Tensor) -> Parts:
    """Both parts of the prediction at `x_sigma` (B, ...)."""
    x0 = denoise(x_sigma, sigma)
    return Parts(x0, eps_of(x_sigma, x0, sigma))


def jump(x_sigma: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The point (B, ...) at `sigma_next` on the straight line from `x_sigma` to `x0`."""
    return x0 + expand(sigma_next / sigma, x_sigma) * (x_sigma - x0)


def invert_jump(y: Tensor, x_sigma: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The x0 (B, ...) that a prediction at `x_sigma` must be to jump to `y` at `sigma_next`, below `sigma`.

    The error of `y` is divided by 1 - sigma_next / sigma: levels next to each other want float64.
    """
    ratio = expand(sigma_next / sigma, x_sigma)
    return (y - ratio * x_sigma) / (1 - ratio)


def renoise(x_sigma: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """`x_sigma` with fresh noise up to `sigma_next`, at or above `sigma`: a draw of the forward process."""
    added = (sigma_next**2 - sigma**2).clamp_min(0).sqrt()
    return x_sigma + expand(added, x_sigma) * torch.randn_like(x_sigma)

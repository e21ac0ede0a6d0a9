"""Distribution matching: the direction between two scores, and the surrogate whose gradient it is."""

from __future__ import annotations

from torch import Tensor

from distill_core.diffusion.levels import expand


def dm_direction(fake_x0: Tensor, teacher_x0: Tensor, x0: Tensor) -> Tensor:
    """Direction g = (D_fake - D_teacher) / mean|x0 - D_teacher|, per sample (DMD, Eq. 7 and 8). All (B, ...).

    A step of `x0` along -g lowers KL(student || teacher).
    """
    scale = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake_x0 - teacher_x0) / expand(scale, x0)


def eps_direction(fake_x0: Tensor, teacher_x0: Tensor, sigma: Tensor) -> Tensor:
    """Direction g = sigma_t^2 (eps_teacher - eps_fake) of score distillation (B, ...); `sigma` (B,).

    sigma_t is that of the variance-preserving form x_t = (x0 + sigma eps) / sqrt(1 + sigma^2), whatever the
    teacher's own form: in x0 the factor is alpha_t sigma_t = sigma / (1 + sigma^2), largest at sigma = 1.
    """
    scale = sigma / (1 + sigma**2)
    return expand(scale, fake_x0) * (fake_x0 - teacher_x0)


def surrogate_loss(x0: Tensor, direction: Tensor) -> Tensor:
    """Scalar whose gradient in `x0` is direction / x0.numel(); its value says nothing about progress."""
    return 0.5 * (x0.float() - (x0 - direction).detach().float()).square().mean()

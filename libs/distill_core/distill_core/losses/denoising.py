"""Denoising score matching, the one loss of teachers and fake scores."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.diffusion.schedule import NoiseSchedule


def add_noise(x0: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = x0 + sigma eps with fresh noise; `x0` (B, ...), `sigma` (B,)."""
    return x0 + sigma.reshape(-1, *([1] * (x0.ndim - 1))) * torch.randn_like(x0)


def denoising_loss(predicted_x0: Tensor, x0: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """E[lambda(sigma) |D(x_sigma, sigma) - x0|^2], lambda as the schedule's own loss has it (scalar)."""
    error = (predicted_x0.float() - x0.float()).square().flatten(1).mean(1)
    return (schedule.loss_weight(sigma) * error).mean()

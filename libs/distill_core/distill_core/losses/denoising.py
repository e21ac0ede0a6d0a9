"""Denoising score matching, the one loss of teachers and fake scores."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.diffusion.levels import expand, mean_by_level
from distill_core.diffusion.schedule import NoiseSchedule


def add_noise(x0: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = x0 + sigma eps with fresh noise; `x0` (B, ...), `sigma` (B,), or by frame (B, F)."""
    return x0 + expand(sigma, x0) * torch.randn_like(x0)


def denoising_loss(predicted_x0: Tensor, x0: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """E[lambda(sigma) |D(x_sigma, sigma) - x0|^2], lambda as the schedule's own loss has it (scalar)."""
    error = mean_by_level((predicted_x0.float() - x0.float()).square(), sigma)
    return (schedule.loss_weight(sigma) * error).mean()

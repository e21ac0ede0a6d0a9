"""Pairwise preference losses (PSO, Diffusion-DPO): which of two samples a model should hold for likelier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def noise_error(predicted_x0: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error (B,) of the noise that a prediction implies, |D - x0|^2 / sigma^2; `sigma` (B,)."""
    return (predicted_x0.float() - x0.float()).square().flatten(1).mean(1) / sigma**2


def preference_loss(gain: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta gain), mean over pairs (scalar); `gain` (B,): by how much the preferred one gained."""
    return F.softplus(-beta * gain).mean()


def margin_loss(gain: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta gain), mean over pairs (scalar)."""
    return F.relu(1 - beta * gain).mean()


def transition_log_density(mean: Tensor, x_next: Tensor, sigma_next: float) -> Tensor:
    """Log N(x_next; mean, sigma_next^2), averaged over the elements of each sample, so free of their number (B,)."""
    error = (x_next.float() - mean.float()).square().flatten(1).mean(1)
    return -0.5 * error / sigma_next**2 - math.log(sigma_next) - 0.5 * math.log(2 * math.pi)


def clipped_log_ratio(log_density: Tensor, reference: Tensor, clip: float) -> Tensor:
    """Log of the densities' ratio held within 1 - clip and 1 + clip (B,); no gradient beyond."""
    return torch.exp(log_density - reference).clamp(1 - clip, 1 + clip).log()

"""Flow matching's loss at random times: what methods share that train a velocity on straight paths."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, MethodConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import drop_condition


class FlowConfig(MethodConfig):
    logit_mean: float = 0.0  # Esser et al. 2024 (arXiv 2403.03206): logit-normal times
    logit_std: float = Field(1.0, gt=0)
    label_dropout: float = Field(
        0.1, ge=0, le=1
    )  # share of items trained without class or prompt, for guidance


def flow_matching_loss(denoiser: Denoiser, batch: Batch, config: FlowConfig) -> Tensor:
    """|v(x_t, t, c) - (eps - x0)|^2 at fresh times and noise (scalar), some conditions dropped as `config` says."""
    x0 = batch.columns["x0"]
    normal = torch.randn(batch.size, device=x0.device)
    t = torch.sigmoid(config.logit_mean + config.logit_std * normal).clamp(1e-3, 0.999)
    sigma = t / (1 - t)
    cond = drop_condition(batch.cond, denoiser, config.label_dropout)
    predicted = denoiser(add_noise(x0, sigma), sigma, cond)
    return denoising_loss(predicted, x0, sigma, denoiser.schedule)

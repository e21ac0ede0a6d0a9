"""Flow matching: a velocity teacher from data on straight paths (rectified flow's interpolation).

    x_t = (1 - t) x0 + t eps,        min E[ |v(x_t, t, c) - (eps - x0)|^2 ],   logit(t) ~ N(mean, std^2)

With x_sigma = x_t / (1 - t) and sigma = t / (1 - t) the loss is |D - x0|^2 / t^2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data.source import Source
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import drop_condition
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    logit_mean: float = 0.0  # Esser et al. 2024 (arXiv 2403.03206): logit-normal times
    logit_std: float = Field(1.0, gt=0)
    label_dropout: float = Field(
        0.1, ge=0, le=1
    )  # share of items trained without class or prompt, for guidance


def flow_matching_loss(denoiser: Denoiser, batch: Batch, config: Config) -> Tensor:
    """The loss above at fresh times and noise (scalar); some conditions are dropped, as `config` says."""
    normal = torch.randn(batch.size, device=batch.x0.device)
    t = torch.sigmoid(config.logit_mean + config.logit_std * normal).clamp(1e-3, 0.999)
    sigma = t / (1 - t)
    cond = drop_condition(batch.cond, denoiser, config.label_dropout)
    predicted = denoiser(add_noise(batch.x0, sigma), sigma, cond)
    return denoising_loss(predicted, batch.x0, sigma, denoiser.schedule)


class FlowMatching(Method):
    paper = "Lipman et al. 2023, Flow Matching for Generative Modeling, arXiv 2210.02747"
    roles = ("teacher",)
    result = "teacher"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        self.teacher = build_denoiser(
            network,
            parameterisation="flow",
            shape=data.shape,
            num_classes=data.num_classes,
            class_names=data.class_names,
            prompts=data.prompts,
        )

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        yield Update("teacher", flow_matching_loss(self.teacher, batch, self.config))

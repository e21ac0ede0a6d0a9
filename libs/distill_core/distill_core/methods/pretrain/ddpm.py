"""DDPM: an eps-predicting teacher from data on a discrete variance-preserving schedule.

    min E_t[ |eps_hat(sqrt(ab_t) x0 + sqrt(1 - ab_t) eps, t, c) - eps|^2 ],   t uniform

In the variance-exploding form used here |eps_hat - eps|^2 = |D - x0|^2 / sigma^2 with sigma^2 = (1 - ab_t) / ab_t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from distill_core.data.source import Source
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import drop_condition
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    schedule: Literal["cosine", "linear"] = "cosine"  # Nichol & Dhariwal 2021; Ho et al. 2020
    num_timesteps: int = Field(1000, ge=10, le=10_000)
    prediction: Literal["eps", "v", "x0"] = "eps"
    label_dropout: float = Field(
        0.1, ge=0, le=1
    )  # share of items trained without class or prompt, for guidance


class DDPM(Method):
    paper = "Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239"
    roles = ("teacher",)
    result = "teacher"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        betas = {"cosine": "squaredcos_cap_v2", "linear": "linear"}[config.schedule]
        self.teacher = build_denoiser(
            network,
            parameterisation=config.prediction,
            shape=data.shape,
            num_classes=data.num_classes,
            class_names=data.class_names,
            prompts=data.prompts,
            scheduler={"beta_schedule": betas, "num_train_timesteps": config.num_timesteps},
        )

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = batch.columns["x0"]
        timestep = torch.randint(self.config.num_timesteps, (batch.size,), device=x0.device)
        sigma = self.teacher.schedule.sigma_at(timestep / (self.config.num_timesteps - 1))
        cond = drop_condition(batch.cond, self.teacher, self.config.label_dropout)
        predicted = self.teacher(add_noise(x0, sigma), sigma, cond)
        yield Update("teacher", denoising_loss(predicted, x0, sigma, self.teacher.schedule))

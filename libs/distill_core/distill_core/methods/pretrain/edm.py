"""EDM: a diffusion teacher from data, with preconditioning and log-normal noise levels.

min E[ lambda(sigma) |D(x0 + sigma eps, sigma, c) - x0|^2 ],   ln sigma ~ N(mean, std^2)
lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from pydantic import Field, model_validator

from distill_core.data.source import Source
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import drop_condition
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    log_sigma_mean: float = -1.2  # Karras et al. 2022, Table 1
    log_sigma_std: float = Field(1.2, gt=0)
    sigma_min: float = Field(0.002, gt=0)  # data std; least and most noise when sampling
    sigma_max: float = Field(80.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)  # standard deviation of the data
    label_dropout: float = Field(
        0.1, ge=0, le=1
    )  # share of items trained without class or prompt, for guidance

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min:g} must be below sigma_max = {self.sigma_max:g}")
        return self


class EDM(Method):
    paper = "Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364"
    roles = ("teacher",)
    result = "teacher"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        self.teacher = build_denoiser(
            network,
            parameterisation="edm",
            shape=data.shape,
            num_classes=data.num_classes,
            class_names=data.class_names,
            prompts=data.prompts,
            scheduler={name: getattr(config, name) for name in ("sigma_min", "sigma_max", "sigma_data")},
        )

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = batch.columns["x0"]
        sigma = (self.config.log_sigma_mean + self.config.log_sigma_std * torch.randn(batch.size)).exp()
        sigma = sigma.to(x0.device)
        cond = drop_condition(batch.cond, self.teacher, self.config.label_dropout)
        predicted = self.teacher(add_noise(x0, sigma), sigma, cond)
        yield Update("teacher", denoising_loss(predicted, x0, sigma, self.teacher.schedule))

"""Super-resolution by diffusion: a teacher that is shown the picture made small, enlarged again, beside its noise.

    min E_t[ |v_hat(a_t x0 + s_t eps, t, y) - (a_t eps - s_t x0)|^2 ],   y = shrink(x0, factor),   t uniform

In the variance-exploding form used here |v_hat - v|^2 = (1 + 1 / sigma^2) |D - x0|^2 with sigma = s_t / a_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field

from distill_core.data.source import Source
from distill_core.losses.denoising import add_noise
from distill_core.losses.distance import l2
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    factor: int = Field(2, ge=2, le=256)  # a side of the picture over one of the small picture
    num_timesteps: int = Field(1000, ge=10, le=10_000)  # of the cosine schedule (Nichol & Dhariwal 2021)


class SuperResolution(Method):
    paper = (
        "Saharia et al. 2021, Image Super-Resolution via Iterative Refinement, arXiv 2104.07636; "
        "Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512"
    )
    roles = ("teacher",)
    result = "teacher"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config = config
        self.teacher = build_denoiser(
            network,
            parameterisation="v",
            shape=data.shape,
            num_classes=None,
            scheduler={"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": config.num_timesteps},
            low_resolution=config.factor,
        )

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "pictures to enlarge"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = batch.columns["x0"]
        timestep = torch.randint(self.config.num_timesteps, (batch.size,), device=x0.device)
        sigma = self.teacher.schedule.sigma_at(timestep / (self.config.num_timesteps - 1))
        predicted = self.teacher(add_noise(x0, sigma), sigma, batch.cond)
        yield Update("teacher", ((1 + sigma**-2) * l2(predicted, x0)).mean())

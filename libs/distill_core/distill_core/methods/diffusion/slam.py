"""Sub-path linear approximation (SLAM): consistency asked at points between a sample and the teacher's next one.

    x_g = g x + (1 - g) x',   S_g^2 = e^2 + g^2 (s^2 - e^2),   g uniform on [0, 1]       x at s, x' one step on at e
    f(x_g) = x_g - S_g eps_S(x_g; s, g),     min E huber( f(x_g), sg f_target(x', e, g = 1) )

The network is told s and g, not S_g. In the form alpha x0 + sigma eps the paper brings x' to the data coefficient of x
first; here both have the coefficient 1. With g = 1 throughout this is LCM, and so it is sampled.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distill_core.diffusion.levels import expand
from distill_core.diffusion.solvers import SolverConfig
from distill_core.diffusion.trajectory import jump
from distill_core.errors import ConfigError
from distill_core.losses.distance import Distance
from distill_core.methods.diffusion._consistency import ConsistencyConfig, ConsistencyDistillation, Points
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser


class Config(ConsistencyConfig):
    num_levels: int = Field(40, ge=1, le=4096)  # official: 50, of 1000 timesteps
    guidance: float = 9.0  # official: 1 + w with w = 8
    solver: SolverConfig = SolverConfig(kind="ddim")
    distance: Distance = "huber"  # between the two ends, per item (`losses.distance`)
    step_counts: tuple[int, ...] = Field((1, 2, 4), min_length=1)
    rounds_steps: ClassVar[bool] = True
    at_sample: float = Field(0.0, ge=0, le=1)  # share of items with g = 1; official 0, and 1 is LCM


class SLAM(ConsistencyDistillation):
    paper = "Xu et al. 2024, Accelerating Image Generation with Sub-path Linear Approximation Model, arXiv 2404.13903"
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        if not isinstance(student, DiffusersDenoiser):
            raise ConfigError(
                "slam's student gains an input, which low-rank factors have no place for; leave [student.lora] out",
                field="student.lora",
            )
        student.tell("gamma")
        super().__init__(config, teacher=teacher, student=student)

    def output(self, points: Points) -> Tensor:
        gamma = torch.rand_like(points.sigma)
        gamma = torch.where(torch.rand_like(gamma) < self.config.at_sample, torch.ones_like(gamma), gamma)
        x, level = sub_path_point(points, gamma)
        x0 = self.student(x, points.sigma, {**points.cond, "gamma": gamma})
        # eps as the network means it, at the level that it is told, brought over the noise that is there
        return jump(x, x0, points.sigma, points.sigma - level)


def sub_path_point(points: Points, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """x_g (B, C, H, W) and its level S_g (B,) for `gamma` (B,); at 1 these are x and its own level to the bit."""
    share = expand(gamma, points.x)
    between = torch.where(share == 1, points.x, share * points.x + (1 - share) * points.moved)
    fall = points.sigma**2 - points.following**2
    level = (points.sigma**2 - (1 - gamma**2) * fall).sqrt()
    return between, torch.where(gamma == 1, points.sigma, level)

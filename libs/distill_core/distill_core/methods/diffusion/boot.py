"""BOOT: a one-step student from noise alone; no data, no stored sample. It learns the signal of the teacher's path.

    y_s  = r y_t + (1 - r) D(x_t, t, c),   x_t = y_t + t eps,   r = s / t < 1          the teacher's step, in the signal
    L_BS = E[ w |g(eps, s) - sg y_s|^2 ],   y_t = g(eps, t),   w = 1 / max(1 - r, floor)
    L_BC = E |g(eps, t_max) - D(t_max eps, t_max, c)|^2,   L = L_BS + beta L_BC

y = x_t - t eps is the signal of a state under the noise eps that its path began with; what is known at t_max is passed
on towards the picture, g(eps, 0). The student reads eps at a level that stands for t: the highest stands for t = 0, so
that one step of it is sampled as any one-step student is, and the half of the teacher's grid for t_max.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.diffusion.levels import expand
from distill_core.diffusion.trajectory import jump
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import Level, few_step_sampler, student_levels


class Config(MethodConfig):
    num_jumps: int = Field(25, ge=2, le=1000)  # 1 / delta: the teacher's steps that a student learns
    boundary_weight: float = Field(1.0, ge=0)  # beta
    floor: float = Field(0.03, gt=0, le=1)  # of 1 - r in the weight
    solver: Literal["euler", "heun"] = "euler"  # heun: the mean of the teacher's x0 at both ends of a step
    level: Level = Field(None, gt=0)  # where paths begin, data std; unset: the teacher's start
    guidance: float = 1.0  # of the teacher; 1 = off


class BOOT(Method):
    paper = (
        "Gu et al. 2023, BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping, "
        "arXiv 2306.05544"
    )
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        given = () if config.level is None else (config.level,)
        (start,) = student_levels(teacher, given, field="config.level")
        count = config.num_jumps
        self.levels = (*teacher.schedule.spread(start, count), 0.0)
        self.labels = teacher.schedule.spread(start, 2 * count)[count::-1]  # of the place on the path, 0 to N
        student.sampler = few_step_sampler(student, (start,))

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        eps = self.noise(batch.size)
        place = torch.randint(self.config.num_jumps, (batch.size,), device=self.device)
        target, weight = self.target(eps, place, batch.cond)
        error = (self.signal(eps, place + 1, batch.cond) - target).square().flatten(1).mean(1)
        loss, metrics = (weight * error).mean(), {"bootstrap": error.detach().mean()}
        if self.config.boundary_weight:
            boundary = self.boundary_error(eps, batch.cond).mean()
            loss, metrics["boundary"] = loss + self.config.boundary_weight * boundary, boundary.detach()
        yield Update("student", loss, metrics)

    def signal(self, eps: Tensor, place: Tensor, cond: Cond) -> Tensor:
        """G (B, C, H, W): the signal at the places (B,) of the paths from `eps`; place N is the picture."""
        levels = torch.tensor(self.labels, device=eps.device)[place]
        scales = [self.student.schedule.start_scale(level) for level in self.labels]
        scale = torch.tensor(scales, device=eps.device)[place]
        y: Tensor = self.student(expand(scale, eps) * eps, levels, cond)
        return y

    @torch.no_grad()
    def target(self, eps: Tensor, place: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Y at the next place (B, C, H, W), by the teacher's step from the student's own state; and the weight (B,)."""
        levels = torch.tensor(self.levels, device=eps.device)
        t, s = levels[place], levels[place + 1]
        x = self.signal(eps, place, cond) + expand(t, eps) * eps
        x0 = self.taught(x, t, cond)
        if self.config.solver == "heun":
            x0 = (x0 + self.taught(jump(x, x0, t, s), torch.where(s > 0, s, t), cond)) / 2
        y = jump(x, x0, t, s) - expand(s, eps) * eps
        return y, 1 / (1 - s / t).clamp_min(self.config.floor)

    def boundary_error(self, eps: Tensor, cond: Cond) -> Tensor:
        """Squared error (B,) of the signal where the path begins: the teacher's first x0."""
        start = eps.new_full((len(eps),), self.levels[0])
        with torch.no_grad():
            first = self.taught(eps * self.teacher.schedule.start_scale(self.levels[0]), start, cond)
        place = torch.zeros(len(eps), dtype=torch.long, device=eps.device)
        return (self.signal(eps, place, cond) - first).square().flatten(1).mean(1)

    def taught(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The teacher's guided x0 (B, C, H, W)."""
        return self.teacher.guided(x_sigma, sigma, cond, self.config.guidance)

    def noise(self, count: int) -> Tensor:
        """Eps (B, C, H, W)."""
        image = self.student.image
        return torch.randn(count, image.channels, image.height, image.width, device=self.device)

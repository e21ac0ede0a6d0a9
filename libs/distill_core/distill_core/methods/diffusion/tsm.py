"""TSM: teacher score matching. A student of another size learns what the teacher sees in noised pictures.

    L = E[ lambda(sigma) |D_theta(x_sigma, sigma, c) - D_teacher^w(x_sigma, sigma, c)|^2 ],   x_sigma = x0 + sigma eps

With probability `own_share` sigma is one of the levels that the student will be used at, else any of the
schedule's: this sampling is lambda, beside the schedule's own weight. The result is where distribution matching
begins (`student.recipe` of `msd` or `dmd2`); random weights are too far from the teacher for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor

from distill_core.data.source import Source
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import Levels, descending, student_levels
from distill_core.recipe.tables import EvaluateConfig


class Config(MethodConfig):
    levels: Levels = ()  # that the student will be used at, data std; () = the teacher's start
    own_share: float = Field(0.5, ge=0, le=1)  # of the items, noised to one of `levels`
    guidance: float = 1.0  # of the teacher; 1 = off

    _descending = field_validator("levels")(descending)


class TSM(Method):
    paper = "Song et al. 2024, Multi-student Diffusion Distillation for Better One-step Generators, arXiv 2410.23274"
    roles = ("student",)
    levels: Tensor

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser, data: Source) -> None:
        super().__init__()
        self.config, self.teacher, self.student, self.data = config, teacher, student, data
        levels = student_levels(teacher, config.levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the noised pictures that teacher and student look at"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        sigma = self.sample_sigma(batch.size)
        student_x0, teacher_x0 = self.both(batch, sigma)
        yield Update("student", denoising_loss(student_x0, teacher_x0, sigma, self.teacher.schedule))

    def both(self, batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x0 of student and teacher in the same noised images, (B, C, H, W) each."""
        with torch.no_grad():
            x_sigma = add_noise(self.teacher.encode(batch.columns["x0"]), sigma)
            teacher_x0 = self.teacher.guided(x_sigma, sigma, batch.cond, self.config.guidance)
        return self.student(x_sigma, sigma, batch.cond), teacher_x0

    def sample_sigma(self, count: int) -> Tensor:
        """(B,) levels: the student's own for `own_share` of them, else uniform on the schedule's grid."""
        own = self.levels[torch.randint(len(self.levels), (count,), device=self.device)]
        grid = self.teacher.schedule.sigma_at(torch.rand(count, device=self.device))
        return torch.where(torch.rand(count, device=self.device) < self.config.own_share, own, grid)

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """`own_level_error`: |D_student - D_teacher|^2 / |D_teacher|^2 on noised pictures, at the student's levels."""
        batch = self.data.all(config.num_samples).to(self.device)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            sigma = self.levels[torch.arange(batch.size, device=self.device) % len(self.levels)]
            student_x0, teacher_x0 = self.both(batch, sigma)
        error = (student_x0 - teacher_x0).square().mean() / teacher_x0.square().mean()
        return {"own_level_error": float(error)}

"""Fine-tuning: a trained denoiser goes on learning, from other data, by the loss that its own schedule weighs.

    min E lambda(s) |D(x0 + s eps, s, c) - x0|^2,    s even on the schedule,   D begins as the teacher

What it leaves is another checkpoint of the teacher's base: adapters of the one may serve the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field

from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import drop_condition


class Config(MethodConfig):
    label_dropout: float = Field(0.1, ge=0, lt=1)  # share of items without their condition, for guidance


class FineTuned(Method):
    paper = "Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "what is learnt"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = self.student.encode(batch.columns["x0"])
        sigma = self.student.schedule.sigma_at(torch.rand(batch.size, device=self.device))
        cond = drop_condition(batch.cond, self.student, self.config.label_dropout)
        answer = self.student(add_noise(x0, sigma), sigma, cond)
        yield Update("student", denoising_loss(answer, x0, sigma, self.student.schedule))

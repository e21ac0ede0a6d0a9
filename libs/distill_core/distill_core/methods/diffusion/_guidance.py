"""Guidance in one pass: what methods share that train a student to repeat a teacher's two.

g(x, s, c) = D_T(x, s, none) + w (D_T(x, s, c) - D_T(x, s, none)),     w = 1 is off
min E lambda(s) |D_S(x, s, c) - g(x, s, c)|^2,                          lambda of the teacher's own loss
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import default_cond, generate_x0
from distill_core.recipe.tables import EvaluateConfig

COMPARED = 512  # pictures that student and teacher make of the same noise, at most


class GuidanceDistillation(Method):
    """A variant says which guidance a step has, and how the student is told of it."""

    roles: tuple[str, ...] = ("student",)
    config: MethodConfig
    teacher: Denoiser
    student: Denoiser

    def __init__(self, config: MethodConfig, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        check_guides(teacher)

    @classmethod
    def columns(cls, config: Any) -> Mapping[str, str]:
        return {"x0": "noised pictures, at which both are asked"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = self.teacher.encode(batch.columns["x0"])
        sigma = self.teacher.schedule.sigma_at(torch.rand(batch.size, device=self.device))
        x = add_noise(x0, sigma)
        guidance = self.guidance(batch)
        with torch.no_grad():
            taught = self.teacher.guided(x, sigma, batch.cond, guidance)
        answer = self.student(x, sigma, self.told(batch.cond, guidance))
        yield Update("student", self.loss(answer, taught, sigma))

    def loss(self, answer: Tensor, taught: Tensor, sigma: Tensor) -> Tensor:
        """The teacher's own loss (scalar) with its guided prediction in the place of the data."""
        return denoising_loss(answer, taught, sigma, self.teacher.schedule)

    def guidance(self, batch: Batch) -> float | Tensor:
        """The scale of each item (B,), or of all."""
        raise NotImplementedError

    def told(self, cond: Cond, guidance: float | Tensor) -> Cond:
        """The student's condition."""
        return cond

    def compared(self) -> Mapping[str, float]:
        """Guidance scales at which student and teacher are compared, by the suffix of their figures."""
        raise NotImplementedError

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Mean squared distance to the guided teacher's pictures of the same noise, which lie in [-1, 1].

        `guided_error` is the student's, `unguided_error` that of the teacher without guidance.
        """
        figures: dict[str, float] = {}
        count = min(config.num_samples, COMPARED)
        for suffix, scale in self.compared().items():
            wanted = self.made(self.teacher, count, config.seed, scale)
            answers: dict[str, tuple[Denoiser, float]] = {
                "guided": (self.student, self.asked(scale)),
                "unguided": (self.teacher, 1.0),
            }
            for name, (model, guidance) in answers.items():
                made = self.made(model, count, config.seed, guidance)
                compared = {"error": float((made - wanted).square().mean())} | self.distances(made, wanted)
                figures |= {f"{name}_{key}{suffix}": value for key, value in compared.items()}
        return figures

    def distances(self, made: Tensor, wanted: Tensor) -> dict[str, float]:
        """Further distances between pictures (B, C, H, W) of the same noise, by the ends of their names."""
        return {}

    def asked(self, scale: float) -> float:
        """The guidance that the student is sampled with to repeat the teacher's at `scale`: it is in its weights."""
        return 1.0

    def made(self, model: Denoiser, count: int, seed: int, guidance: float) -> Tensor:
        """`count` pictures (B, C, H, W) of the teacher's sampler and of noise that is always the same."""
        cond, sampler = default_cond(model.cond, count, model), self.teacher.sampler
        x0 = generate_x0(model, cond, range(count), seed=seed, sampler=sampler, guidance=guidance)
        return model.decode(x0).clamp(-1, 1)


def check_guides(teacher: Denoiser) -> None:
    """Refuse a teacher that has no condition to be guided to, or none to be guided away from."""
    if teacher.cond.kind in ("none", "low_resolution") or (
        teacher.cond.kind == "class_label" and teacher.cond.null_label is None
    ):
        raise ConfigError(
            "guidance needs a teacher with conditions and a null condition, and this one has none; "
            "train it with label_dropout above 0",
            field="teacher",
        )

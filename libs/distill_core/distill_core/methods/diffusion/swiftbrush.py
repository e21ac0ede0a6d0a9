"""SwiftBrush: variational score distillation into a one-step student, from conditions alone, without any picture.

    dL/dtheta = E[ W (D_fake^w(x_sigma) - D_teacher^w(x_sigma)) dx0/dtheta ]
    x0        = G_theta(sigma* z),   x_sigma = x0 + sigma eps,   D^w = D(null) + w (D(cond) - D(null))
    W         = alpha_t sigma_t (the paper's), or 1 / mean |x0 - D_teacher^w(x_sigma)| (DMD's)

The fake score is the teacher with a LoRA adapter, trained on the student's samples in turn with the student.
Under one w > 0 for both scores this descends KL(x) + w KL(cond | x): its optimum is the teacher without guidance,
whatever w. What w decides is how the fake score's errors come in: w times that given cond, w - 1 times the null's.
Score distillation (SDS) is the same with the drawn noise for the fake score's, i.e. D_fake = x0: it seeks modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.losses.matching import dm_direction, eps_direction, surrogate_loss
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.networks.adapters import LoraConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore
from distill_core.networks.levels import Level, few_step_sampler, student_levels


class ScoreConfig(MethodConfig):
    """What SwiftBrush and its variants share: all but the guidance."""

    score: Literal["vsd", "sds"] = "vsd"  # sds: no fake score
    weight: Literal["eps_sigma2", "dmd"] = "eps_sigma2"
    fake_score: Literal["lora", "full"] = "lora"  # full: a copy of the teacher
    lora: LoraConfig = LoraConfig(rank=64, alpha=108.0, targets=("to_q", "to_v"))  # official
    fake_steps: int = Field(1, ge=1)  # fake-score updates per student update, on the same samples
    fake_guidance: float | None = None  # of the fake score; unset: the teacher's, sample by sample
    condition_dropout: float = Field(0.1, ge=0, le=1)  # of the fake score, the whole batch; 0 if unguided
    level: Level = Field(None, gt=0)  # the student's noise level, data std; unset: the teacher's start
    min_level: float = Field(0.02, ge=0, lt=1)  # range of the schedule's grid where the scores are compared
    max_level: float = Field(0.98, gt=0, le=1)

    @model_validator(mode="after")
    def _some_levels(self) -> Self:
        if self.min_level >= self.max_level:
            raise ValueError("min_level must be below max_level")
        return self


class Config(ScoreConfig):
    guidance: float = 4.5  # of teacher and fake score alike; 1 = off


class SwiftBrush(Method):
    paper = (
        "Nguyen and Tran 2024, SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score "
        "Distillation, arXiv 2312.05239"
    )
    roles = ("fake_score", "student")
    config: Config

    def __init__(self, config: ScoreConfig, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        self.law = self.guidance_law(config)
        self._check_null_condition()
        self.fake_score = FakeScore(teacher, lora=config.lora if config.fake_score == "lora" else None)
        given = () if config.level is None else (config.level,)
        student.sampler = few_step_sampler(student, student_levels(teacher, given, field="config.level"))

    def guidance_law(self, config: Config) -> GuidanceLaw:
        """Where a step's scale comes from."""
        return GuidanceLaw.fixed(config.guidance)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = self.generate(batch)
        if self.config.score == "vsd":
            for _ in range(self.config.fake_steps):  # first: an untrained adapter says what the teacher says
                yield Update("fake_score", self.fake_score_loss(x0.detach(), batch))

        with torch.no_grad():
            direction = self.direction(x0, batch)
        yield Update(
            "student",
            surrogate_loss(x0, direction),
            {"score_gap": direction.abs().mean(), "x0_std": x0.detach().std()},
        )

    def direction(self, x0: Tensor, batch: Batch) -> Tensor:
        """Where the samples must not go (B, C, H, W): one draw of level, noise and scale for both scores."""
        sigma = self.sample_sigma(x0, self.config.min_level, self.config.max_level)
        x_sigma, guidance = add_noise(x0, sigma), self.law.draw(x0)
        teacher_x0 = self.teacher.guided(x_sigma, sigma, self.teacher_cond(batch), guidance)
        if self.config.score == "sds":
            fake_x0 = x0
        else:
            if self.config.fake_guidance is not None:
                guidance = self.config.fake_guidance
            fake_x0 = self.fake_score.guided(x_sigma, sigma, self.fake_cond(batch), guidance)
        if self.config.weight == "dmd":
            return dm_direction(fake_x0, teacher_x0, x0)
        return eps_direction(fake_x0, teacher_x0, sigma)

    def fake_score_loss(self, x0: Tensor, batch: Batch) -> Tensor:
        """Denoising loss on the student's samples; at times without the condition, which guidance reads."""
        sigma, cond = self.sample_sigma(x0, 0.0, 1.0), self.fake_cond(batch)
        # differs from the official loss: the schedule's own weight, without a further alpha_t^2
        if self.config.condition_dropout and torch.rand(()) < self.config.condition_dropout:
            cond = self.teacher.null_cond(batch.size)
        return denoising_loss(
            self.fake_score(add_noise(x0, sigma), sigma, cond), x0, sigma, self.teacher.schedule
        )

    def teacher_cond(self, batch: Batch) -> Cond:
        """What the teacher is told of the batch; the student is told all of it."""
        return batch.cond

    def fake_cond(self, batch: Batch) -> Cond:
        """What the fake score is told of the batch."""
        return batch.cond

    def generate(self, batch: Batch) -> Tensor:
        """x0 of the student's one step, from fresh noise."""
        image, spec = self.student.image, self.student.sampler
        z = torch.randn(batch.size, image.channels, image.height, image.width, device=self.device)
        return self.student(z * spec.noise_scale, z.new_full((batch.size,), spec.sigmas[0]), batch.cond)

    def sample_sigma(self, like: Tensor, low: float, high: float) -> Tensor:
        """(B,) levels, uniform on a part of the teacher's own noise grid."""
        u = torch.rand(len(like), device=like.device)
        return self.teacher.schedule.sigma_at(low + (high - low) * u)

    def _check_null_condition(self) -> None:
        guided = not self.law.is_off or self.config.fake_guidance not in (None, 1)
        if self.teacher.cond.kind == "none" and guided:
            raise ConfigError(
                "guidance needs a conditional teacher, and this one takes no condition; use guidance 1",
                field="config.guidance",
            )
        if guided or self.config.condition_dropout:
            self.teacher.null_cond(1)  # a teacher without a null class says so now, not at step 900

"""Score distillation into a one-step student: what SwiftBrush, PG-SB and NASA-T share; `swiftbrush` has the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.losses.matching import dm_direction, eps_direction, surrogate_loss
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore
from distill_core.networks.levels import Level, few_step_sampler, student_levels
from distill_core.recipe.tables import LoraConfig


class ScoreConfig(MethodConfig):
    """Everything but the guidance."""

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


class ScoreDistillation(Method):
    """A variant says where a step's guidance comes from, in `guidance_law`."""

    roles = ("fake_score", "student")

    def __init__(self, config: ScoreConfig, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        self.law = self.guidance_law(config)
        self._check_null_condition()
        self.fake_score = FakeScore(teacher, lora=config.lora if config.fake_score == "lora" else None)
        levels = student_levels(
            teacher, () if config.level is None else (config.level,), field="config.level"
        )
        student.sampler = few_step_sampler(student, levels)

    def guidance_law(self, config: Any) -> GuidanceLaw:
        """Distribution of a step's guidance scale."""
        raise NotImplementedError

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
        """Difference of the two scores (B, C, H, W), to be descended: at one draw of level, noise and scale."""
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
        """Condition of the teacher; the student has all of the batch's."""
        return batch.cond

    def fake_cond(self, batch: Batch) -> Cond:
        """Condition of the fake score."""
        return batch.cond

    def generate(self, batch: Batch) -> Tensor:
        """x0 of the student's one step, from fresh noise."""
        image, spec = self.student.image, self.student.sampler
        z = torch.randn(batch.size, image.channels, image.height, image.width, device=self.device)
        x0: Tensor = self.student(z * spec.noise_scale, z.new_full((batch.size,), spec.sigmas[0]), batch.cond)
        return x0

    def sample_sigma(self, like: Tensor, low: float, high: float) -> Tensor:
        """(B,) levels, uniform on a part of the teacher's own noise grid."""
        u = torch.rand(len(like), device=like.device)
        return self.teacher.schedule.sigma_at(low + (high - low) * u)

    def _check_null_condition(self) -> None:
        guided = not self.law.is_off or self.config.fake_guidance not in (None, 1)
        if self.teacher.cond.kind in ("none", "low_resolution") and guided:
            raise ConfigError(
                "guidance needs a conditional teacher, of classes or prompts, and this one is none; use guidance 1",
                field="config.guidance",
            )
        if guided or self.config.condition_dropout:
            self.teacher.null_cond(1)  # a teacher without a null class says so now, not at step 900


class DrawnGuidanceConfig(ScoreConfig):
    """The range of a scale that is drawn for each sample."""

    guidance_min: float = 0.5
    guidance_max: float = 4.0  # SD 1.5 and 2.1; PixArt-alpha: 3. Equal to guidance_min: SwiftBrush

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_min > self.guidance_max:
            raise ValueError("guidance_min must not be above guidance_max")
        return self


class DrawnGuidance(ScoreDistillation):
    """Both scores under a scale that is drawn for each sample, the training of SNOOPI."""

    paper = (
        "Nguyen et al. 2024, SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance, "
        "arXiv 2412.02687"
    )
    config: DrawnGuidanceConfig

    def guidance_law(self, config: DrawnGuidanceConfig) -> GuidanceLaw:
        return GuidanceLaw(config.guidance_min, config.guidance_max)

"""DMD2: distribution matching distillation into a one- or few-step student that the teacher scores like data.

    dL/dtheta = E[ w (D_fake(x_sigma) - D_teacher(x_sigma)) dx0/dtheta ] + lambda dL_GAN/dtheta
    x0 = G_theta(sigma_k z_k),   x_sigma = x0 + sigma eps,   w = 1 / mean |x0 - D_teacher(x_sigma)|

The fake score is updated `critic_steps` times per student update (two time scales); its trunk carries the GAN head.
A student of several levels is trained on its own intermediate samples (backward simulation), not on noised data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field, field_validator
from torch import Tensor

from distill_core.data.source import Source
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ConfigError
from distill_core.losses.adversarial import discriminator_loss, generator_loss
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.losses.matching import dm_direction, surrogate_loss
from distill_core.method import Batch, Cond, Method, MethodConfig, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore


class Config(MethodConfig):
    critic_steps: int = Field(5, ge=1)  # fake-score updates per student update (official: 5, SD 1.5: 10)
    guidance: float = 1.0  # of the teacher's score only; 1 = off (SD 1.5: 1.75, SDXL: 8)
    gan_weight: float = Field(
        0.0, ge=0
    )  # in the student's loss; official 3e-3 at 64x64x3, grows as 1/sqrt(D)
    discriminator_weight: float = Field(1e-2, ge=0)  # in the fake score's loss
    levels: tuple[float, ...] = ()  # student's noise levels, data std, descending; () = the teacher's highest
    min_level: float = Field(
        0.02, ge=0, lt=1
    )  # range of the schedule's grid where the two scores are compared
    max_level: float = Field(0.98, gt=0, le=1)

    @field_validator("levels")
    @classmethod
    def _descending(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels), reverse=True) or any(level <= 0 for level in levels):
            raise ValueError("levels must be positive and strictly descending, e.g. [5.0, 1.0]")
        return levels


class DMD2(Method):
    Config = Config
    paper = "Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867"
    roles = ("fake_score", "student")

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser, data: Source) -> None:
        super().__init__()
        if config.gan_weight and data.shape is None:
            raise ConfigError(
                "gan_weight needs real images, and this data has none; set config.gan_weight = 0"
            )
        self.config, self.teacher, self.student = config, teacher, student
        self.fake_score = FakeScore(teacher, discriminate=config.gan_weight > 0)
        self.levels = config.levels or (teacher.sampler.sigma_max,)
        if self.levels[0] > teacher.schedule.sigma_max:
            raise ConfigError(
                f"level {self.levels[0]:g} is above the teacher's highest, {teacher.schedule.sigma_max:g}",
                field="config.levels",
            )
        scale = student.schedule.start_scale(self.levels[0])
        student.sampler = SamplerSpec.few_step(self.levels, noise_scale=scale)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        for _ in range(self.config.critic_steps):
            x0 = self.generate(batch).detach()  # the fake score follows the student, it must not pull it
            yield Update("fake_score", self.fake_score_loss(x0, batch))

        x0 = self.generate(batch)
        sigma = self.sample_sigma(x0)
        x_sigma = add_noise(x0, sigma)
        with torch.no_grad():
            teacher_x0 = self.teacher.guided(x_sigma, sigma, batch.cond, self.config.guidance)
            direction = dm_direction(self.fake_score(x_sigma, sigma, batch.cond), teacher_x0, x0)
        loss = surrogate_loss(x0, direction)
        if self.config.gan_weight:  # through the trunk into x0; the loop steps the student alone
            _, logits = self.fake_score.with_logits(add_noise(x0, sigma), sigma, batch.cond)
            loss = loss + self.config.gan_weight * generator_loss(logits)
        yield Update("student", loss, {"score_gap": direction.abs().mean(), "x0_std": x0.detach().std()})

    def fake_score_loss(self, x0: Tensor, batch: Batch) -> Tensor:
        """Denoising loss on the student's samples, plus the discriminator's on the same pass."""
        sigma = self.sample_sigma(x0)
        if not self.config.gan_weight:
            predicted = self.fake_score(add_noise(x0, sigma), sigma, batch.cond)
            return denoising_loss(predicted, x0, sigma, self.teacher.schedule)
        both = add_noise(torch.cat([x0, self.teacher.encode(batch.x0)]), sigma.repeat(2))
        cond = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in batch.cond.items()}
        predicted, logits = self.fake_score.with_logits(both, sigma.repeat(2), cond)
        fake_logits, real_logits = logits.chunk(2)
        loss = denoising_loss(predicted[: len(x0)], x0, sigma, self.teacher.schedule)
        return loss + self.config.discriminator_weight * discriminator_loss(real_logits, fake_logits)

    def generate(self, batch: Batch) -> Tensor:
        """One differentiable student call at a random level, its input simulated by the student itself."""
        shape = batch.size, self.student.image.channels, self.student.image.height, self.student.image.width
        x = torch.randn(shape, device=self.device) * self.student.sampler.noise_scale
        chosen = int(torch.randint(len(self.levels), ())) if len(self.levels) > 1 else 0
        with torch.no_grad():
            for level, following in zip(self.levels[:chosen], self.levels[1 : chosen + 1]):
                x = add_noise(self.call_student(x, level, batch.cond), x.new_full((batch.size,), following))
        return self.call_student(x, self.levels[chosen], batch.cond)

    def call_student(self, x: Tensor, level: float, cond: Cond) -> Tensor:
        return self.student(x, x.new_full((len(x),), level), cond)

    def sample_sigma(self, like: Tensor) -> Tensor:
        """(B,) levels, uniform on the middle of the teacher's own noise grid."""
        u = torch.rand(len(like), device=like.device)
        return self.teacher.schedule.sigma_at(
            self.config.min_level + (self.config.max_level - self.config.min_level) * u
        )

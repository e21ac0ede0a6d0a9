"""Distribution matching by a fake score: what DMD2 and its variants share; `dmd2` has the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.errors import ConfigError
from distill_core.losses.adversarial import discriminator_loss, generator_loss
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.losses.matching import dm_direction, surrogate_loss
from distill_core.method import Batch, Cond, Method, MethodConfig, Stage, Update
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore
from distill_core.networks.levels import Levels, descending, few_step_sampler, student_levels
from distill_core.networks.routed import RoutedFakeScore


class MatchingConfig(MethodConfig):
    critic_steps: int = Field(5, ge=1)  # fake-score updates per student update (official: 5, SD 1.5: 10)
    guidance: float = 1.0  # of the teacher's score only; 1 = off (SD 1.5: 1.75, SDXL: 8)
    gan_weight: float = Field(
        0.0, ge=0
    )  # in the student's loss; official 3e-3 at 64x64x3, grows as 1/sqrt(D)
    discriminator_weight: float = Field(1e-2, ge=0)  # in the fake score's loss
    levels: Levels = ()  # student's noise levels, data std, descending; () = the teacher's start
    rollout: Literal["simulated", "noised_data"] = "simulated"  # what the levels after the first are fed
    regression_steps: int = Field(0, ge=0)  # student updates on [pairs] before the matching begins
    min_level: float = Field(
        0.02, ge=0, lt=1
    )  # range of the schedule's grid where the two scores are compared
    max_level: float = Field(0.98, gt=0, le=1)

    _descending = field_validator("levels")(descending)


class DistributionMatching(Method):
    """A variant overrides one of `target`, `weigh`, `preparation`, `critic_updates`, `generate`, `student_loss`."""

    roles: tuple[str, ...] = ("fake_score", "student")
    fake_score: FakeScore | RoutedFakeScore

    def __init__(
        self, config: MatchingConfig, *, teacher: Denoiser, student: Denoiser, pairs: Pairs | None = None
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.student, self.pairs = config, teacher, student, pairs
        self.levels = student_levels(teacher, config.levels, count=self.num_levels)
        self._check_inputs()
        self.fake_score = FakeScore(teacher, discriminate=self.discriminates)
        student.sampler = few_step_sampler(student, self.levels)

    @classmethod
    def columns(cls, config: MatchingConfig) -> Mapping[str, str]:
        if config.gan_weight:
            return {"x0": "the discriminator (config.gan_weight)"}
        return {"x0": "config.rollout = 'noised_data'"} if config.rollout == "noised_data" else {}

    @classmethod
    def stages(cls, config: MatchingConfig, steps: int) -> tuple[Stage, ...]:
        first = Stage("regression", config.regression_steps, ("student",))
        before = tuple(stage for stage in (first, *cls.preparation(config)) if stage.steps)
        return (*before, Stage("matching", max(steps, 1), cls.roles))

    @classmethod
    def preparation(cls, config: MatchingConfig) -> tuple[Stage, ...]:
        """Stages between the regression and the matching, in which the student rests; of no steps if it has none."""
        return ()

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        stage = self.stage_of(step)
        if stage.name == "regression":
            yield Update("student", self.regression_loss(batch.size))
            return
        for _ in range(self.config.critic_steps):
            with torch.no_grad():  # the fake score follows the student, it must not pull it
                x0 = self.generate(batch)
            yield from self.critic_updates(x0, batch)
        if "student" in stage.roles:
            loss, metrics = self.student_loss(self.generate(batch), batch, step)
            yield Update("student", loss, metrics)

    def student_loss(self, x0: Tensor, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution matching and GAN at one shared x_sigma; the loss and what to log."""
        sigma = self.sample_sigma(x0)
        x_sigma = add_noise(x0, sigma)
        fake_x0, logits = self.fake_with_logits(x_sigma, sigma, batch.cond)
        with torch.no_grad():
            teacher_x0 = self.target(step).guided(x_sigma, sigma, batch.cond, self.config.guidance)
            direction = self.weigh(dm_direction(fake_x0, teacher_x0, x0), logits, sigma)
        loss = surrogate_loss(x0, direction)
        if self.config.gan_weight:  # through the trunk into x0; the loop steps the student alone
            assert logits is not None
            loss = loss + self.config.gan_weight * generator_loss(logits)
        return loss, {"score_gap": direction.abs().mean(), "x0_std": x0.detach().std()}

    @property
    def num_levels(self) -> int:
        """Number of the student's levels where `config.levels` does not name them."""
        return 1

    @property
    def discriminates(self) -> bool:
        """Whether the fake score's trunk carries a discriminator."""
        return self.config.gan_weight > 0

    def target(self, step: int) -> Denoiser:
        """The denoiser whose score the student's samples are matched to at this step."""
        return self.teacher

    def fake_with_logits(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The fake score's x0 (detached), and the discriminator's logits, differentiable in `x_sigma` for the GAN."""
        if not self.discriminates:
            with torch.no_grad():
                return self.fake_score(x_sigma, sigma, cond), None
        fake_x0, logits = self.fake_score.with_logits(x_sigma, sigma, cond)
        return fake_x0.detach(), logits

    def weigh(self, direction: Tensor, logits: Tensor | None, sigma: Tensor) -> Tensor:
        """The direction (B, C, H, W) with a variant's weight of each sample."""
        return direction

    def critic_updates(self, x0: Tensor, batch: Batch) -> Iterator[Update]:
        """Updates of what learns from the student's samples `x0`, which carry no gradient."""
        yield Update("fake_score", self.fake_score_loss(x0, batch))

    def fake_score_loss(self, x0: Tensor, batch: Batch) -> Tensor:
        """Denoising loss on the student's samples, plus the discriminator's on the same pass."""
        sigma = self.sample_sigma(x0)
        if not self.discriminates:
            predicted = self.fake_score(add_noise(x0, sigma), sigma, batch.cond)
            return denoising_loss(predicted, x0, sigma, self.teacher.schedule)
        predicted, logits = self.fake_score.with_logits(*self.with_real(x0, sigma, batch))
        loss = denoising_loss(predicted[: len(x0)], x0, sigma, self.teacher.schedule)
        return loss + self.config.discriminator_weight * self.discriminator_term(logits)

    def discriminator_term(self, logits: Tensor) -> Tensor:
        """The discriminator's loss on the logits of what `with_real` gave."""
        fake_logits, real_logits = logits.chunk(2)
        return discriminator_loss(real_logits, fake_logits)

    def with_real(self, x0: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Cond]:
        """Samples, then real pictures, noised to the same levels: x_sigma (2B, C, H, W), sigma and condition."""
        both = add_noise(torch.cat([x0, self.teacher.encode(batch.columns["x0"])]), sigma.repeat(2))
        cond = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in batch.cond.items()}
        return both, sigma.repeat(2), cond

    def generate(self, batch: Batch) -> Tensor:
        """x0 of one student call at a random level; differentiable in the student where gradients are on."""
        shape = batch.size, self.student.image.channels, self.student.image.height, self.student.image.width
        x = torch.randn(shape, device=self.device) * self.student.sampler.noise_scale
        levels = self.path()
        chosen = int(torch.randint(len(levels), ())) if len(levels) > 1 else 0
        if chosen:
            x = self.roll_out(x, levels[: chosen + 1], batch)
        return self.call_student(x, levels[chosen], batch.cond)

    def path(self) -> Sequence[float]:
        """The levels that a sample passes, of which one is trained."""
        return self.levels

    @torch.no_grad()
    def roll_out(self, x: Tensor, levels: Sequence[float], batch: Batch) -> Tensor:
        """The input at the last of `levels`: what sampling from pure noise `x` arrives there with."""
        if (
            self.config.rollout == "noised_data"
        ):  # the mismatch of training and sampling that simulation removes
            return add_noise(self.teacher.encode(batch.columns["x0"]), x.new_full((batch.size,), levels[-1]))
        for level, following in itertools.pairwise(levels):
            x = add_noise(self.call_student(x, level, batch.cond), x.new_full((batch.size,), following))
        return x

    def call_student(self, x: Tensor, level: float, cond: Cond) -> Tensor:
        x0: Tensor = self.student(x, x.new_full((len(x),), level), cond)
        return x0

    def regression_loss(self, count: int) -> Tensor:
        """Mean square distance of the student's first call from what the teacher's ODE makes of the same noise."""
        assert self.pairs is not None
        pairs = self.pairs.draw(count)
        cond = {name: value.to(self.device) for name, value in pairs.cond.items()}
        x = pairs.z.to(self.device) * self.student.sampler.noise_scale
        return F.mse_loss(self.call_student(x, self.levels[0], cond), pairs.x0.to(self.device))

    def sample_sigma(self, like: Tensor) -> Tensor:
        """(B,) levels, uniform on the middle of the teacher's own noise grid."""
        u = torch.rand(len(like), device=like.device)
        return self.teacher.schedule.sigma_at(
            self.config.min_level + (self.config.max_level - self.config.min_level) * u
        )

    def _check_inputs(self) -> None:
        if self.config.regression_steps and self.pairs is None:
            raise ConfigError(
                "regression_steps needs the teacher's pairs: add a [pairs] table, e.g. pairs.count = 2048",
                field="config.regression_steps",
            )

"""YONOS-SR: scale distillation. A student that enlarges more learns what a teacher answers that is shown more.

    min E_s[ max(1 / s^2, 1) |D_S(x, s, y_f) - D_T(x, s, y_g)|^2 ],   x = x0 + s eps,   y_k = shrink(x0, k),   f > g

Both see one noised picture; the student's condition is the smaller one. Then T <- S, g <- f, and the next factor f
follows, until the last. The student serves in one step, from pure noise; of a latent model the decoder is then tuned to
what that step gives (`methods/diffusion/_decoder.py`). `distil` = false learns from x0 itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink, small_shape
from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise
from distill_core.losses.distance import l2, truncated_snr
from distill_core.method import Batch, Method, Stage, Update
from distill_core.methods.diffusion._decoder import DecoderConfig, DecoderTuning
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import few_step_sampler, level_grid


class Config(DecoderConfig):
    factors: tuple[int, ...] = Field((4, 8), min_length=1)  # of the stages; the teacher's own comes before
    num_levels: int = Field(64, ge=1, le=1000)  # noise levels that are trained; the highest is the student's
    distil: bool = True  # False: direct training, on the pictures in the place of the teacher's answers

    @field_validator("factors")
    @classmethod
    def _rise(cls, factors: tuple[int, ...]) -> tuple[int, ...]:
        if min(factors) < 2 or any(high <= low or high % low for low, high in pairwise(factors)):
            raise ValueError("factors must rise, each a multiple of the one before, e.g. [4, 8]")
        return factors


class Yonos(Method):
    paper = (
        "Noroozi et al. 2024, You Only Need One Step: Fast Super-Resolution with Stable Diffusion via Scale "
        "Distillation, arXiv 2401.17258"
    )
    roles: tuple[str, ...] = ("student",)
    held = ("former",)  # the student of the stage before

    def __init__(
        self, config: Config, *, teacher: Denoiser, student: Denoiser, extractor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.student = config, teacher, student
        self.shown = checked_factor(teacher, config.factors)  # the factor of who teaches
        self.former = copy.deepcopy(student).requires_grad_(False)
        self.grid = level_grid(teacher, config.num_levels)
        student.sampler = few_step_sampler(student, self.grid.levels[:1])
        self.enlarge_by(config.factors[0])
        self.tuning: DecoderTuning | None = None
        if config.decoder_steps:
            self.tuning = DecoderTuning(config, student, extractor)
            self.decoder, self.critic = self.tuning.decoder, self.tuning.critic
            self.features = self.tuning.features  # a part of this module, so that it is where the others are
            self.roles = ("student", *self.tuned(config))

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "pictures to enlarge"}

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        each = max((steps - config.decoder_steps) // len(config.factors), 1)
        scales = tuple(
            Stage(f"factor_{factor}", each, cls.roles, restart=index > 0)
            for index, factor in enumerate(config.factors)
        )
        last = (Stage("decoder", config.decoder_steps, cls.tuned(config)),) if config.decoder_steps else ()
        return (*scales, *last)

    @staticmethod
    def tuned(config: Config) -> tuple[str, ...]:
        """Roles of the decoder's stage."""
        return ("decoder", "critic") if config.gan_weight else ("decoder",)

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        if stage.name == "decoder":
            self.enlarge_by(self.config.factors[-1])
            return
        factor = int(stage.name.removeprefix("factor_"))
        self.former.load_state_dict(self.student.state_dict())
        self.shown = self.config.factors[self.config.factors.index(factor) - 1]
        self.enlarge_by(factor)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = batch.columns["x0"]
        if self.tuning is not None and self.stage_of(step).name == "decoder":
            yield from self.tuning.updates(self.student.decode(self.one_step(x0)), x0)
            return
        sigma = self.grid.at(self.grid.draw(batch.size, self.device))
        x = add_noise(self.teacher.encode(x0), sigma)
        target = self.target(x, sigma, x0)
        error = l2(self.student(x, sigma, self.condition(x0, self.factor)), target)
        yield Update("student", (truncated_snr(sigma) * error).mean(), {"x0_error": error.detach().mean()})

    @torch.no_grad()
    def target(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """x0 (B, C, H, W) as who teaches sees it at the same `x`, shown a larger picture than the student is."""
        if not self.config.distil:
            return self.teacher.encode(x0)
        teaches = self.teacher if self.shown == self.teacher.cond.factor else self.former
        answer: Tensor = teaches(x, sigma, self.condition(x0, self.shown))
        return answer

    @torch.no_grad()
    def one_step(self, x0: Tensor) -> Tensor:
        """What the student makes of the pictures `x0` (B, C, H, W), made small, and of fresh noise: its own x0."""
        image = self.student.image
        noise = torch.randn(len(x0), image.channels, image.height, image.width, device=x0.device)
        sigma = self.grid.at(torch.zeros(len(x0), dtype=torch.long, device=x0.device))
        x = noise * self.student.sampler.noise_scale
        answer: Tensor = self.student(x, sigma, self.condition(x0, self.factor))
        return answer

    def condition(self, x0: Tensor, factor: int) -> dict[str, Tensor]:
        """The pictures `x0` (B, C, H, W), `factor` times smaller."""
        return {LOW_RESOLUTION: shrink(x0, factor)}

    def enlarge_by(self, factor: int) -> None:
        """Make the student one that enlarges `factor` times, in what is kept of it too."""
        self.factor = factor
        self.student.cond = self.student.cond.model_copy(update={"factor": factor})


def checked_factor(teacher: Denoiser, factors: tuple[int, ...]) -> int:
    """The teacher's own factor, of which `factors` go on.

    Raises:
        ConfigError: a teacher that does not enlarge, or factors that do not follow from its own or divide its pictures.
    """
    own = teacher.cond.factor
    if own is None:
        raise ConfigError(
            "this teacher does not enlarge pictures; train one by the method super_resolution, e.g. "
            "teacher.recipe = 'super_resolution_digits'",
            field="teacher",
        )
    if factors[0] == own or factors[0] % own:
        raise ConfigError(
            f"config.factors begins with {factors[0]}, and the teacher enlarges {own} times; begin with twice that, or "
            "another multiple",
            field="config.factors",
        )
    small_shape(teacher.image.picture, factors[-1], field="config.factors")
    return own

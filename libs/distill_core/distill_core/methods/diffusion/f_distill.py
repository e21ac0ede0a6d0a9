"""f-distill: DMD2 under any f-divergence, by weighting each sample of its direction with the density ratio.

    dL/dtheta = E[ h(r) w (D_fake(x_sigma) - D_teacher(x_sigma)) dx0/dtheta ] + lambda dL_GAN(x_sigma)/dtheta
    h(r)      = f''(r) r^2,   r = p_teacher(x_sigma) / p_student(x_sigma) = exp(logit of the discriminator)

r is read at the very x_sigma that the scores see, normalised per noise level, and h has mean 1 over the batch.
Reverse KL has h = 1 and is DMD2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.data.pairs import Pairs
from distill_core.diffusion.levels import expand
from distill_core.losses.adversarial import approximate_r1, discriminator_loss
from distill_core.losses.divergence import (
    Divergence,
    TimeBinNormalizer,
    batch_normalised,
    density_ratio,
    divergence_weight,
)
from distill_core.method import Batch, Cond, Stage, Update
from distill_core.methods.diffusion._distribution_matching import DistributionMatching, MatchingConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import LogitHead, trunk_width


class Config(MatchingConfig):
    divergence: Divergence = (
        "jensen_shannon"  # the paper's for large data; forward_kl there has a high variance
    )
    features: Literal["fake_score", "teacher"] = (
        "fake_score"  # trunk that the discriminator reads; teacher: frozen
    )
    warmup_steps: int = Field(0, ge=0)  # steps of fake score and discriminator alone, before h is trusted
    ratio_min: float = Field(0.1, gt=0, le=1)  # clamp of r (official)
    ratio_max: float = Field(20.0, ge=1)
    ratio_bins: int = Field(10, ge=1)  # noise levels of equal share at which r is normalised (official)
    ratio_decay: float = Field(
        0.9, ge=0, lt=1
    )  # of a bin's running mean (official ImageNet: 0.5 at batch 512)
    r1_weight: float = Field(0.0, ge=0)  # of the discriminator's penalty (official: 100 to 1000)
    r1_noise: float = Field(0.1, gt=0)  # data std, official

    @model_validator(mode="after")
    def _discriminator_learns(self) -> Self:
        if (
            self.divergence != "reverse_kl"
            and self.features == "fake_score"
            and not self.discriminator_weight
        ):
            raise ValueError(
                "discriminator_weight = 0 leaves the density ratio untrained; give a positive weight, "
                "features = 'teacher', or divergence = 'reverse_kl'"
            )
        return self


class FDistill(DistributionMatching):
    paper = (
        "Xu et al. 2025, One-step Diffusion Models with f-Divergence Distribution Matching, arXiv 2502.15681"
    )
    config: Config

    def __init__(
        self, config: Config, *, teacher: Denoiser, student: Denoiser, pairs: Pairs | None = None
    ) -> None:
        super().__init__(config, teacher=teacher, student=student, pairs=pairs)
        shares = torch.linspace(config.min_level, config.max_level, config.ratio_bins + 1)
        self.normalizer = TimeBinNormalizer(teacher.schedule.sigma_at(shares), config.ratio_decay)
        if config.features == "teacher":
            self.roles = ("fake_score", "discriminator", "student")
            self.discriminator = LogitHead(trunk_width(teacher))

    def weigh(self, direction: Tensor, logits: Tensor | None, sigma: Tensor) -> Tensor:
        """The direction times h(r), which has mean 1."""
        if self.config.divergence == "reverse_kl":
            return direction
        assert logits is not None
        ratio = density_ratio(logits, self.config.ratio_min, self.config.ratio_max)
        weight = divergence_weight(self.config.divergence, self.normalizer(ratio, sigma))
        return direction * expand(batch_normalised(weight), direction)

    def fake_with_logits(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        fake_x0, logits = super().fake_with_logits(x_sigma, sigma, cond)
        if "discriminator" in self.roles:
            logits = self.teacher_logits(x_sigma, sigma, cond)
        return fake_x0, logits

    def teacher_logits(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """Logits (B,) of the discriminator's head on the frozen teacher's features."""
        _, features = self.teacher.with_features(x_sigma, sigma, cond)
        logits: Tensor = self.discriminator(features[-1])
        return logits

    def critic_updates(self, x0: Tensor, batch: Batch) -> Iterator[Update]:
        yield from super().critic_updates(x0, batch)
        if "discriminator" in self.roles:
            inputs = self.with_real(x0, self.sample_sigma(x0), batch)
            yield Update("discriminator", self.discriminator_term(self.teacher_logits(*inputs)))

    def with_real(self, x0: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Cond]:
        """DMD2's, and for the penalty the noised real pictures once more, slightly moved: 3B in all."""
        both, sigmas, cond = super().with_real(x0, sigma, batch)
        if not self.config.r1_weight:
            return both, sigmas, cond
        real = both[batch.size :]
        moved = real + self.config.r1_noise * torch.randn_like(real)
        last = {name: torch.cat([value, value[batch.size :]]) for name, value in cond.items()}
        return torch.cat([both, moved]), sigma.repeat(3), last

    def discriminator_term(self, logits: Tensor) -> Tensor:
        if not self.config.r1_weight:
            return super().discriminator_term(logits)
        fake, real, moved = logits.chunk(3)
        return discriminator_loss(real, fake) + self.config.r1_weight * approximate_r1(real, moved)

    @classmethod
    def preparation(cls, config: MatchingConfig) -> tuple[Stage, ...]:
        assert isinstance(config, Config)
        critics = ("fake_score", "discriminator") if config.features == "teacher" else ("fake_score",)
        return (Stage("warm_up", config.warmup_steps, critics),)

    @property
    def discriminates(self) -> bool:
        if self.config.features == "teacher":
            return False
        return super().discriminates or self.config.divergence != "reverse_kl"

    @classmethod
    def columns(cls, config: MatchingConfig) -> Mapping[str, str]:
        assert isinstance(config, Config)
        if config.features == "teacher":
            return {"x0": "the discriminator (config.features = 'teacher')"}
        if config.divergence != "reverse_kl":
            return {"x0": f"the discriminator (config.divergence = {config.divergence!r})"}
        return super().columns(config)

    def state(self) -> dict[str, Tensor]:
        return self.normalizer.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.normalizer.load_state_dict(state)

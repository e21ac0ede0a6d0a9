"""Hyper-SD, score distillation: one student, most often low-rank factors, that serves several numbers of steps.

    L  = L_dm(x0) + mse_weight |G(sigma_1 z) - ODE(z)|^2 + feedback_weight max(0, threshold - r(decode(x0), c))
    x0 = G(x_k, sigma_k),   k a level of the path that N steps take,   N drawn from step_counts

L_dm is DMD's. Every level of every path is trained on what sampling itself arrives with, and the gradient passes
through the one last call. With one number of steps and no weights this is DMD2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.data.classes import naming_classes
from distill_core.data.pairs import Pairs
from distill_core.errors import ConfigError
from distill_core.losses.reward import RewardConfig, build_reward, hinge_loss
from distill_core.method import Batch
from distill_core.methods.diffusion._distribution_matching import DistributionMatching, MatchingConfig
from distill_core.networks.denoiser import Denoiser


class Config(MatchingConfig):
    step_counts: tuple[int, ...] = Field(
        (1,), min_length=1
    )  # numbers of steps to serve; N take every (K/N)-th level
    trained: Literal["every", "first"] = "every"  # levels of a path; first: the top one alone
    mse_weight: float = Field(0.0, ge=0)  # of the distance to the teacher's own samples, for stability
    feedback_weight: float = Field(0.0, ge=0)
    reward: RewardConfig = RewardConfig()
    threshold: float = 1.0  # a reward from which nothing more is wanted

    @model_validator(mode="after")
    def _every_level_is_on_a_path(self) -> Self:
        if list(self.step_counts) != sorted(set(self.step_counts)) or self.step_counts[0] < 1:
            raise ValueError("step_counts must be positive and strictly ascending, e.g. [1, 2, 4]")
        if self.levels and self.step_counts[-1] != len(self.levels):
            raise ValueError(
                f"the largest of step_counts must be the number of levels, {len(self.levels)}: "
                "a level that no path takes would stay untrained"
            )
        return self


class HyperSDScore(DistributionMatching):
    paper = (
        "Ren et al. 2024, Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis, "
        "arXiv 2404.13686"
    )
    config: Config

    def __init__(
        self,
        config: Config,
        *,
        teacher: Denoiser,
        student: Denoiser,
        pairs: Pairs | None = None,
        extractor: nn.Module | None = None,
    ) -> None:
        super().__init__(config, teacher=teacher, student=student, pairs=pairs)
        if config.mse_weight and pairs is None:
            raise ConfigError(
                "mse_weight needs the teacher's pairs: add a [pairs] table, e.g. pairs.count = 2048",
                field="config.mse_weight",
            )
        asked = config.reward.name == "class_probability"
        self.extractor = extractor = naming_classes(extractor, teacher.cond, asked=asked)
        self.reward = build_reward(config.reward, extractor, num_classes=teacher.cond.num_classes)
        if len(config.step_counts) > 1:
            student.sampler = student.sampler.model_copy(update={"step_counts": config.step_counts})

    @property
    def num_levels(self) -> int:
        return self.config.step_counts[-1]

    def path(self) -> Sequence[float]:
        counts = self.config.step_counts
        count = counts[int(torch.randint(len(counts), ()))] if len(counts) > 1 else counts[0]
        levels = self.student.sampler.levels(count)
        return levels if self.config.trained == "every" else levels[:1]

    def student_loss(self, x0: Tensor, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().student_loss(x0, batch, step)
        if self.config.mse_weight:
            mse = self.regression_loss(batch.size)
            loss, metrics["mse"] = loss + self.config.mse_weight * mse, mse.detach()
        if self.config.feedback_weight:
            score = self.reward.score(self.student.decode(x0), batch.cond)
            loss = loss + self.config.feedback_weight * hinge_loss(score, self.config.threshold)
            metrics["reward"] = score.detach().mean()
        return loss, metrics

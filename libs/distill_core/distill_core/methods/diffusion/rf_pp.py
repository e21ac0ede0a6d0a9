"""RF++: one reflow that is trained where it is hard, at the ends of the lines, and under a premetric beyond squares.

    L    = E[ (1 - t) huber(u_theta(x_t, t, c), eps - x0) + w(t) features(x_hat, x0) ],   x_hat = x_t - t u_theta
    p(t) ~ e^(a t) + e^(a (1 - t)),   huber(a, b) = (sqrt(|a - b|^2 + (c d)^2) - c d) / d,   w(t) = 1 / t, or 1

The student begins as the teacher: on these lines any denoiser is the same velocity field from the first update on
(`diffusion.rectified`). `times` = "uniform", `distance` = "l2", `features` = "off" is plain reflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.data.pairs import Pairs
from distill_core.diffusion.rectified import Times
from distill_core.losses.distance import Distance
from distill_core.method import Batch, Update
from distill_core.methods.diffusion._rectified_flow import FlowConfig, RectifiedFlow
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.networks.perceptual import FeatureDistance
from distill_core.recipe.tables import EvaluateConfig

ENDS = (0.02, 0.95)  # times near the lines' ends, where the held-out error is told beside that in the middle


class Config(FlowConfig):
    times: Times = "u_shaped"  # law of t: more towards both ends, or the same everywhere
    steepness: float = Field(4.0, gt=0, le=50)  # a; official: 4
    distance: Distance = "huber_norm"  # official; "l2": plain reflow, without the factor 1 - t
    features: Literal["off", "even", "inverse"] = "inverse"  # w(t): 1 / t as config F, 1 as config E
    feature_weight: float = Field(1.0, gt=0)  # official: 1, of LPIPS
    num_steps: Literal[1, 2, 4] = 4  # at most; the student is Euler's at 1, 2 and 4


class RFPP(RectifiedFlow):
    paper = "Lee et al. 2024, Improving the Training of Rectified Flows, arXiv 2405.20320"
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
        off = config.features == "off"
        self.features = None if off else FeatureDistance(extractor, student.image.picture)
        counts = tuple(count for count in (1, 2, 4) if count <= config.num_steps)
        levels = student_levels(teacher, count=config.num_steps)
        student.sampler = few_step_sampler(student, levels, counts, eta=0.0)

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        line = self.drawn(batch.size)
        t = self.times(batch.size, self.config.times, self.config.steepness)
        distance, x0 = self.velocity_distance(line, t, self.config.distance)
        if self.config.distance != "l2":
            distance = (1 - t) * distance
        loss = distance.mean()
        if self.features is None:
            yield Update("student", loss)
            return
        perceptual = (self.feature_weight(t) * self.picture_distance(x0, line.x0)).mean()
        yield Update(
            "student", loss + perceptual, {"velocity": loss.detach(), "features": perceptual.detach()}
        )

    def feature_weight(self, t: Tensor) -> Tensor:
        """Weight (B,) of the distance of features at the times `t` (B,)."""
        weight = 1 / t if self.config.features == "inverse" else torch.ones_like(t)
        return self.config.feature_weight * weight

    def picture_distance(self, x0: Tensor, target: Tensor) -> Tensor:
        """Distance (B,) of the features of what these decode to."""
        assert self.features is not None
        with torch.no_grad():
            target = self.teacher.decode(target)
        return self.features.items(self.student.decode(x0), target)

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """On held-out pairs: straightness, one step's distance, and the velocity's error at the ends and between."""
        lines = self.held_out(config)
        figures = {
            "straightness": self.straightness(self.student, lines),
            "teacher_straightness": self.straightness(self.teacher, lines),
            "pair_distance": self.pair_distance(self.student, lines),
        }
        for name, at in {"picture": ENDS[0], "middle": 0.5, "noise": ENDS[1]}.items():
            errors = []
            for line in lines:
                t = line.x0.new_full((len(line.x0),), at)
                errors.append(self.velocity_distance(line, t)[0])
            figures[f"velocity_error_{name}"] = float(torch.cat(errors).mean())
        return figures

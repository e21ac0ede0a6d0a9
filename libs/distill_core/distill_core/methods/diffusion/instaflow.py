"""InstaFlow: reflow, which straightens a teacher's paths, then distillation of the straight flow into one step.

    reflow   min E |u_theta(x_t, t, c) - (eps - x0)|^2,   x0 = ODE(teacher, z, c),   x_t = (1 - t) x0 + t eps,  t ~ U
    distil   min E d(x_hat, x0'),   x_hat = z - u_theta(z, 1, c),   x0' = ODE(reflowed, z, c),   begun as the reflowed

d is the mean square, then (after `l2_steps`) the distance of features. No picture is read: pairs are rolled out from
noise, the teacher's for reflow and the reflowed model's own for distillation. `reflow_steps` = 0 distils the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.data.pairs import Pairs
from distill_core.method import Batch, Model, Stage, Update
from distill_core.methods.diffusion._rectified_flow import FlowConfig, Line, RectifiedFlow
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.networks.perceptual import FeatureDistance
from distill_core.recipe.tables import EvaluateConfig


class Config(FlowConfig):
    reflow_steps: int = Field(1500, ge=0)  # official: 70k updates at batch 64, then 25k at 1024
    flow_steps: int = Field(
        25, ge=1, le=1000
    )  # Euler's, by which the reflowed model makes pairs; official: 25
    flow_guidance: float = 1.0  # in these; 1 = off; official: 1.5
    l2_steps: int | None = Field(
        None, ge=1
    )  # before features take over; unset: all; official: 21.5k of 39.5k


class InstaFlow(RectifiedFlow):
    paper = (
        "Liu et al. 2023, InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation, "
        "arXiv 2309.06380"
    )
    config: Config
    held = ("flow",)

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
        self.features = None if config.l2_steps is None else FeatureDistance(extractor, student.image.picture)
        levels = student_levels(teacher, count=config.flow_steps)
        self.flow = self.copied()
        self.flow.sampler = few_step_sampler(student, levels, eta=0.0)
        self._own: Pairs | None = (
            None  # a function of the flow's weights: made or found again after a resumption
        )

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        reflow = (
            (Stage("reflow", config.reflow_steps, cls.roles, restart=True),) if config.reflow_steps else ()
        )
        distil = Stage("distil", config.l2_steps or steps, cls.roles, restart=True)
        if config.l2_steps is None:
            return (*reflow, distil)
        return (*reflow, distil, Stage("features", steps, cls.roles, restart=True))

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        if stage.name == "distil":
            self.keep_flow()

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        stage = self.stage_of(step).name
        if stage == "reflow":
            distance, _ = self.velocity_distance(self.drawn(batch.size), self.times(batch.size))
            yield Update("student", distance.mean())
            return
        line = self.drawn(batch.size, self.own_pairs())
        yield Update("student", self.distance(self.first_call(self.student, line), line, stage))

    def own_pairs(self) -> Pairs:
        """What distillation learns from: the reflowed model's pairs; the teacher's where nothing was reflowed."""
        if not self.config.reflow_steps:
            return self.pairs
        if self._own is None:
            changes = {"num_steps": self.config.flow_steps, "guidance": self.config.flow_guidance}
            self._own = self.pairs.remade(self.flow, **changes)
        return self._own

    def distance(self, x0: Tensor, line: Line, stage: str) -> Tensor:
        """Distance (scalar) of the student's step from where the flow ends."""
        if stage != "features":
            return (x0 - line.x0).square().mean()
        assert self.features is not None
        with torch.no_grad():
            target = self.teacher.decode(line.x0)
        return self.features.items(self.student.decode(x0), target).mean()

    def published(self) -> Mapping[str, Model]:
        return {"student": self.student, **({"flow": self.flow} if self.config.reflow_steps else {})}

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """How straight teacher and reflowed model are, and how far one step of theirs and the student's is off."""
        lines = self.held_out(config)
        figures = {"pair_distance": self.pair_distance(self.student, lines)}
        for name, model in {"teacher_": self.teacher, "flow_": self.flow}.items():
            if model is self.teacher or self.config.reflow_steps:
                figures[f"{name}straightness"] = self.straightness(model, lines)
                figures[f"{name}pair_distance"] = self.pair_distance(model, lines)
        return figures

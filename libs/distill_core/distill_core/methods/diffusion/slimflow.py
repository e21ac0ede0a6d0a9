"""SlimFlow: a smaller student, which begins random, by annealed reflow and then flow-guided distillation.

    reflow   min E |u_theta(x_t, t, c) - (eps' - x0)|^2,   eps' = sqrt(1 - b^2) eps + b xi,   b from 1 down to 0
    distil   min E d(G(z, c), x0) + w E d(G(z', c), x_hat(z')),   G one step of the student, begun as the small flow
             x_hat(z'): one step of the student to t' ~ U[0.2, 0.8], then one of the small flow to 0; no gradient

(z, x0) are stored pairs of the large teacher, xi and z' fresh noise. b = 1 is flow matching on what the teacher made,
b = 0 reflow: the curriculum takes the place of a warm start. `anneal_steps` = 0 starts cold, `w` = 0 distils naively.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.data.pairs import Pairs
from distill_core.diffusion.rectified import level_of
from distill_core.diffusion.trajectory import jump
from distill_core.method import Batch, Cond, Stage, Update
from distill_core.methods.diffusion._rectified_flow import FlowConfig, Line, RectifiedFlow
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.perceptual import FeatureDistance
from distill_core.recipe.tables import EvaluateConfig

MIDDLE = 0.2, 0.8  # range of the flow time at which a two-step target changes networks
FLOW_STEPS = 8  # Euler's, at which the small flow is measured


class Config(FlowConfig):
    reflow_steps: int = Field(1500, ge=1)  # of the small flow, before one step is distilled from it
    anneal_steps: int = Field(
        900, ge=0
    )  # over which b falls to 0; official: 300k of up to 1.3M; 0: a cold start
    flow_guided: float = Field(1.0, ge=0)  # w; official: 1; 0: stored pairs alone
    features: bool = False  # d: of the [extractor]'s features; else the mean square; official: LPIPS


class SlimFlow(RectifiedFlow):
    paper = (
        "Zhu et al. 2024, SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow, "
        "arXiv 2407.12718"
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
        self.flow = self.copied()
        self.features = FeatureDistance(extractor, student.image.picture) if config.features else None

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        return (
            Stage("reflow", config.reflow_steps, cls.roles, restart=True),
            Stage("distil", steps, cls.roles, restart=True),
        )

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.keep_flow()  # differs from the official code, whose helper has the averaged weights

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        line = self.drawn(batch.size)
        if self.stage_of(step).name == "reflow":
            share = self.fresh_share(step)
            distance, _ = self.velocity_distance(self.annealed(line, share), self.times(batch.size))
            yield Update("student", distance.mean(), {"fresh_share": share})
            return
        naive = self.distance(self.first_call(self.student, line), line.x0)
        if not self.config.flow_guided:
            yield Update("student", naive)
            return
        guided = self.guided_loss(torch.randn_like(line.x0), batch.cond)
        loss = naive + self.config.flow_guided * guided
        yield Update("student", loss, {"naive": naive.detach(), "guided": guided.detach()})

    def fresh_share(self, step: int) -> float:
        """Share b of the noise that is fresh in a step."""
        if not self.config.anneal_steps:
            return 0.0
        return max(0.0, 1 - step / self.config.anneal_steps)

    def annealed(self, line: Line, share: float) -> Line:
        """The lines with fresh noise for a part of theirs."""
        if not share:
            return line
        kept: float = (1 - share**2) ** 0.5
        return line._replace(eps=kept * line.eps + share * torch.randn_like(line.eps))

    def guided_loss(self, z: Tensor, cond: Cond) -> Tensor:
        """Distance (scalar) of the student's step from unit noise `z` from its own two-step target."""
        sigma = z.new_full((len(z),), self.level)
        x = z * self.noise_scale
        x0 = self.student(x, sigma, cond)
        with torch.no_grad():
            low, high = MIDDLE
            middle = level_of(low + (high - low) * torch.rand(len(z), device=z.device))
            target = self.flow(jump(x, x0, sigma, middle), middle, cond)
        return self.distance(x0, target)

    def distance(self, x0: Tensor, target: Tensor) -> Tensor:
        """Distance d of two batches (scalar)."""
        if self.features is None:
            return (x0 - target).square().mean()
        with torch.no_grad():
            pictures = self.teacher.decode(target)
        return self.features.items(self.student.decode(x0), pictures).mean()

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """On held-out pairs: the student's distance, that of the small flow in more steps; and the size in weights."""
        lines = self.held_out(config)
        sizes = [sum(value.numel() for value in model.parameters()) for model in (self.student, self.teacher)]
        return {
            "pair_distance": self.pair_distance(self.student, lines),
            "flow_pair_distance": self.pair_distance(self.flow, lines, FLOW_STEPS),
            "flow_straightness": self.straightness(self.flow, lines),
            "size_share": sizes[0] / sizes[1],
        }

"""Stochastic consistency distillation (SCott): the teacher moves along its SDE, and a discriminator keeps it sharp.

    x' = h steps of the SDE from x at s to e, each with the share eta of fresh noise
    L_S = d( f(x, s), sg f_target(x', e) ) + w softplus(-A(f(x, s) + s' eps)),    f = D_S
    L_A = softplus(A(f + s' eps)) + softplus(-A(x0 + s' eps)),                     s' drawn afresh

Under noise the first term alone leads to the mean of all ends, E[x0 | x]: eta is small, and A is what undoes it. A is
the teacher with low-rank factors and a head on its trunk, told condition and level. The paper's hinge is a softplus.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor

from distill_core.diffusion.solvers import SolverConfig
from distill_core.losses.adversarial import discriminator_loss, generator_loss
from distill_core.losses.denoising import add_noise
from distill_core.losses.distance import Distance
from distill_core.method import Batch, Cond, Update
from distill_core.methods.diffusion._consistency import ConsistencyConfig, ConsistencyDistillation, Points
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_score import FakeScore
from distill_core.recipe.tables import LoraConfig


class Config(ConsistencyConfig):
    solver: SolverConfig = SolverConfig(kind="sde", substeps=4, eta=0.3)
    distance: Distance = "huber"  # between the two ends, per item (`losses.distance`)
    gan_weight: float = Field(0.1, ge=0)  # w
    lora: LoraConfig = LoraConfig(rank=64, alpha=64.0)  # of the discriminator


class SCott(ConsistencyDistillation):
    paper = (
        "Liu et al. 2024, SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation, "
        "arXiv 2403.01505"
    )
    roles: tuple[str, ...] = ("discriminator", "student")
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)
        self.discriminator = FakeScore(teacher, discriminate=True, lora=config.lora)

    def further(self, error: Tensor, output: Tensor, batch: Batch, points: Points) -> Iterator[Update]:
        metrics = {"x0_std": output.detach().std()}
        if not self.config.gan_weight:
            yield Update("student", error, metrics)
            return
        real = self.teacher.encode(batch.columns["x0"])
        fake_logits, real_logits = (self.logits(x0, points.cond) for x0 in (output.detach(), real))
        yield Update("discriminator", discriminator_loss(real_logits, fake_logits))

        adversarial = generator_loss(self.logits(output, points.cond))
        metrics |= {"consistency": error.detach(), "adversarial": adversarial.detach()}
        yield Update("student", error + self.config.gan_weight * adversarial, metrics)

    def logits(self, x0: Tensor, cond: Cond) -> Tensor:
        """The discriminator's answer (B,) to `x0`, noised to random levels of the grid."""
        sigma = self.grid.at(self.grid.draw(len(x0), x0.device))
        return self.discriminator.with_logits(add_noise(x0, sigma), sigma, cond)[1]

"""Latent consistency distillation (LCM, LCM-LoRA): consistency along the guided teacher's trajectories.

    g  = D_T(x, s, none) + w (D_T(x, s, c) - D_T(x, s, none))          guided, w = 1 is off
    x' = J(g; s -> e)                                                  one DDIM step over many of the teacher's own
    min E huber( f(x, s, c), sg f_target(x', e, c) ),   f = D_S,  f(., 0) = identity

The guidance is baked in: sampling takes one evaluation a step. With low-rank factors as the student ([student.lora])
and `target_decay` = 0 this is LCM-LoRA, whose factors plain diffusers loads beside its LCMScheduler. Differs from the
official code: its boundary mix c_skip(t) x + c_out(t) x0, 1 % of the sample at the lowest timestep, is exactly x0.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.diffusion.solvers import SolverConfig
from distill_core.losses.distance import Distance
from distill_core.methods.diffusion._consistency import ConsistencyConfig, ConsistencyDistillation
from distill_core.networks.denoiser import Denoiser


class Config(ConsistencyConfig):
    num_levels: int = Field(40, ge=1, le=4096)  # official: 50, of 1000 timesteps
    guidance: float = 8.5  # of the teacher, baked into the student; 1 = off
    guidance_max: float | None = None  # each item's is uniform from `guidance` to this (official: 6 to 16)
    solver: SolverConfig = SolverConfig(kind="ddim")
    distance: Distance = "huber"  # between the two ends, per item (`losses.distance`)
    step_counts: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1)

    rounds_steps: ClassVar[bool] = True

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_max is not None and self.guidance_max < self.guidance:
            raise ValueError("guidance_max must not be below guidance")
        return self


class LCM(ConsistencyDistillation):
    paper = (
        "Luo et al. 2023, Latent Consistency Models, arXiv 2310.04378, and LCM-LoRA: A Universal "
        "Stable-Diffusion Acceleration Module, arXiv 2311.05556"
    )
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)
        highest = config.guidance if config.guidance_max is None else config.guidance_max
        self.law = GuidanceLaw(config.guidance, highest)

    def scale(self, x: Tensor) -> float | Tensor:
        drawn: float | Tensor = self.law.draw(x)
        return drawn

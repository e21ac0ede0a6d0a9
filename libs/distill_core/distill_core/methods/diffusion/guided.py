"""Guided distillation, stage 1: one network for a range of guidance, which is one of its inputs.

    min E max(1 / s^2, 1) |D_S(x, s, c, w) - g_w(x, s, c)|^2,   w uniform on a range,
    g_w = D_T(x, s, none) + w (D_T(x, s, c) - D_T(x, s, none))               w = 1 is off; the paper's is one less

One evaluation a step takes the place of two, at any guidance of the range. `progressive` with this student as its
teacher is stage 2: few steps, still told w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.errors import ConfigError
from distill_core.losses.distance import l2, truncated_snr
from distill_core.method import Batch, Cond, MethodConfig
from distill_core.methods.diffusion._guidance import GuidanceDistillation
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser


class Config(MethodConfig):
    guidance_min: float = Field(1.0, ge=0)  # paper: 1 to 5 for pixels, 3 to 15 for Stable Diffusion
    guidance_max: float = Field(5.0, ge=0)  # greatest guidance that is drawn
    told: bool = True  # False: the student is not told, and learns one guidance for all

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.guidance_min >= self.guidance_max:
            raise ValueError("guidance_min must be below guidance_max; lora_guidance learns a single one")
        return self


class Guided(GuidanceDistillation):
    paper = "Meng et al. 2023, On Distillation of Guided Diffusion Models, arXiv 2210.03142"
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)
        if not isinstance(student, DiffusersDenoiser):
            raise ConfigError(
                "a student that is told its guidance gains an input, which low-rank factors have no place for; "
                "leave [student.lora] out",
                field="student.lora",
            )
        student.tell("guidance")
        allowed = config.guidance_min, config.guidance_max
        usual = min(max(teacher.sampler.guidance, allowed[0]), allowed[1])
        student.sampler = teacher.sampler.model_copy(
            update={"guidance": usual, "guidance_range": allowed, "guidable": False}
        )
        self.law = GuidanceLaw(*allowed)

    def guidance(self, batch: Batch) -> float | Tensor:
        return self.law.draw(batch.index.float())

    def told(self, cond: Cond, guidance: float | Tensor) -> Cond:
        return {**cond, "guidance": guidance} if self.config.told and isinstance(guidance, Tensor) else cond

    def loss(self, answer: Tensor, taught: Tensor, sigma: Tensor) -> Tensor:
        return (truncated_snr(sigma) * l2(answer, taught)).mean()

    def compared(self) -> Mapping[str, float]:
        low, high = self.config.guidance_min, self.config.guidance_max
        return {"_low": low, "_middle": (low + high) / 2, "_high": high}

    def asked(self, scale: float) -> float:
        return scale

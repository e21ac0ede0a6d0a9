"""LoRA guidance distillation: low-rank factors give in one pass what guidance takes two for.

    min E lambda(s) |D_{W + BA}(x, s, c) - g_W(x, s, c)|^2,   g_W = guided prediction of the frozen weights W

Student and teacher share W: there is one copy of it in memory, and without the factors it is the teacher, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from distill_core.errors import ConfigError
from distill_core.method import Batch, MethodConfig
from distill_core.methods.diffusion._guidance import GuidanceDistillation
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.denoiser import Denoiser


class Config(MethodConfig):
    guidance: float = 3.0  # w, baked into the factors
    target: Literal["guided", "conditional"] = "guided"  # conditional: the teacher without guidance


class LoraGuidance(GuidanceDistillation):
    paper = "Golnari 2023, LoRA-Enhanced Distillation on Guided Diffusion Models, arXiv 2312.06899"
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)
        if not isinstance(student, LoraDenoiser):
            raise ConfigError(
                "lora_guidance trains low-rank factors over its teacher: add a [student.lora] table, e.g. rank = 16",
                field="student.lora",
            )
        student.sampler = teacher.sampler.model_copy(update={"guidance": 1.0, "guidable": False})

    def guidance(self, batch: Batch) -> float:
        return self.config.guidance if self.config.target == "guided" else 1.0

    def compared(self) -> Mapping[str, float]:
        return {"": self.config.guidance}

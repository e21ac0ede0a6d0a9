"""PG-SB, the training of SNOOPI: SwiftBrush with the guidance scale drawn per sample, shared by both scores.

    dL/dtheta = E[ W (D_fake^w(x_sigma) - D_teacher^w(x_sigma)) dx0/dtheta ],   w ~ U(guidance_min, guidance_max)

A fixed scale must be found anew for every teacher; a random one need not. `fake_guidance` takes the fake score out
of the draw, which is then the teacher's alone.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.methods.diffusion.swiftbrush import ScoreConfig, SwiftBrush


class Config(ScoreConfig):
    guidance_min: float = 0.5
    guidance_max: float = 4.0  # SD 1.5 and 2.1; PixArt-alpha: 3. Equal to guidance_min: SwiftBrush

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_min > self.guidance_max:
            raise ValueError("guidance_min must not be above guidance_max")
        return self


class PGSB(SwiftBrush):
    paper = (
        "Nguyen et al. 2024, SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance, "
        "arXiv 2412.02687"
    )
    config: Config

    def guidance_law(self, config: Config) -> GuidanceLaw:
        return GuidanceLaw(config.guidance_min, config.guidance_max)

"""SwiftBrush: variational score distillation into a one-step student, from conditions alone, without any picture.

    dL/dtheta = E[ W (D_fake^w(x_sigma) - D_teacher^w(x_sigma)) dx0/dtheta ]
    x0        = G_theta(sigma* z),   x_sigma = x0 + sigma eps,   D^w = D(null) + w (D(cond) - D(null))
    W         = alpha_t sigma_t (the paper's), or 1 / mean |x0 - D_teacher^w(x_sigma)| (DMD's)

The fake score is the teacher with a LoRA adapter, trained on the student's samples in turn with the student.
Under one w > 0 for both scores this descends KL(x) + w KL(cond | x): its optimum is the teacher without guidance,
whatever w. What w decides is how the fake score's errors come in: w times that given cond, w - 1 times the null's.
Score distillation (SDS) is the same with the drawn noise for the fake score's, i.e. D_fake = x0: it seeks modes.
"""

from __future__ import annotations

from distill_core.diffusion.guidance import GuidanceLaw
from distill_core.methods.diffusion._score_distillation import ScoreConfig, ScoreDistillation


class Config(ScoreConfig):
    guidance: float = 4.5  # of teacher and fake score alike; 1 = off


class SwiftBrush(ScoreDistillation):
    paper = (
        "Nguyen and Tran 2024, SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score "
        "Distillation, arXiv 2312.05239"
    )
    config: Config

    def guidance_law(self, config: Config) -> GuidanceLaw:
        return GuidanceLaw.fixed(config.guidance)

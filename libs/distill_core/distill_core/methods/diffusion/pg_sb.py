"""PG-SB, the training of SNOOPI: SwiftBrush with the guidance scale drawn per sample, shared by both scores.

    dL/dtheta = E[ W (D_fake^w(x_sigma) - D_teacher^w(x_sigma)) dx0/dtheta ],   w ~ U(guidance_min, guidance_max)

A fixed scale must be found anew for every teacher; a random one need not. `fake_guidance` takes the fake score out
of the draw, which is then the teacher's alone.
"""

from distill_core.methods.diffusion._score_distillation import DrawnGuidance


class PGSB(DrawnGuidance):
    """All that it shares with NASA-T, and no more."""

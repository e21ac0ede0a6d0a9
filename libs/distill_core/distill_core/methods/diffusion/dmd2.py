"""DMD2: distribution matching distillation into a one- or few-step student that the teacher scores like data.

    dL/dtheta = E[ w (D_fake(x_sigma) - D_teacher(x_sigma)) dx0/dtheta ] + lambda dL_GAN(x_sigma)/dtheta
    x0 = G_theta(sigma_k z_k),   x_sigma = x0 + sigma eps,   w = 1 / mean |x0 - D_teacher(x_sigma)|

The fake score is updated `critic_steps` times per student update (two time scales); its trunk carries the GAN head.
A student of several levels is trained on its own intermediate samples (backward simulation), not on noised data.
A student below the teacher's highest level begins with `regression_steps` on the teacher's own samples (SDXL).
"""

from distill_core.methods.diffusion._distribution_matching import DistributionMatching


class DMD2(DistributionMatching):
    """All that its variants share, and no more."""

    paper = "Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867"

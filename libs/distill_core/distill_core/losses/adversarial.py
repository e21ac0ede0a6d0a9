"""The non-saturating GAN loss on real/fake logits (Goodfellow et al. 2014; softplus form)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """softplus(-D(fake)), mean over the batch (scalar)."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)), each averaged (scalar)."""
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def approximate_r1(logits: Tensor, moved_logits: Tensor) -> Tensor:
    """E[(D(x) - D(x + s n))^2]: for a small s, s^2 times R1 = E|dD/dx|^2, without a second derivative (scalar)."""
    return F.mse_loss(moved_logits.float(), logits.float())

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

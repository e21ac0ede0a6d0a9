"""The fake score: a diffusion model of the student's own samples, with an optional real/fake head on its trunk."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distill_core.method import Cond
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.denoiser import Denoiser
from distill_core.recipe.tables import LoraConfig


class LogitHead(nn.Module):
    """Trunk features (B, D, h, w) to one real/fake logit (B,)."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.GroupNorm(8, hidden),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.last = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layers(features)).squeeze(1)
        return logits


class FakeScore(nn.Module):
    """A trainable copy of the teacher, or with `lora` a trainable adapter over the teacher's own weights.

    `discriminate=True` adds the logit head that the GAN loss reads.
    """

    def __init__(
        self, teacher: Denoiser, *, discriminate: bool = False, lora: LoraConfig | None = None
    ) -> None:
        super().__init__()
        self.denoiser: Denoiser
        if lora is None:
            self.denoiser = copy.deepcopy(teacher).requires_grad_(True)
        else:
            self.denoiser = LoraDenoiser(teacher, lora)
        self.head: LogitHead | None = None
        if discriminate:
            self.head = LogitHead(trunk_width(teacher))

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x0 (B, C, H, W)."""
        return self.denoiser(x_sigma, sigma, cond)

    def guided(self, x_sigma: Tensor, sigma: Tensor, cond: Cond, guidance: float | Tensor) -> Tensor:
        """x0 under classifier-free guidance; only meaningful after training with the condition dropped at times."""
        return self.denoiser.guided(x_sigma, sigma, cond, guidance)

    def with_logits(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """x0 (B, C, H, W) and the real/fake logits (B,), from one pass."""
        assert self.head is not None
        x0, features = self.denoiser.with_features(x_sigma, sigma, cond)
        return x0, self.head(features[-1])


@torch.no_grad()
def trunk_width(teacher: Denoiser) -> int:
    """Channels of the features that a head on this teacher's trunk reads."""
    parameter = next(teacher.parameters())
    shape = 1, teacher.image.channels, teacher.image.height, teacher.image.width
    x = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
    labels = {"class_label": torch.zeros(1, dtype=torch.long, device=parameter.device)}
    _, features = teacher.with_features(
        x, x.new_ones(1), labels if teacher.cond.kind == "class_label" else None
    )
    return features[-1].shape[1]

"""A small convolutional discriminator of noised pictures, told their noise level and class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_core.diffusion.levels import expand
from distill_core.method import Cond

GROUPS = 8
WIDEST = 4  # times the first width


class NoisyDiscriminator(nn.Module):
    """Pictures (B, C, H, W) at noise levels `sigma` (B,) -> real/fake logits (B,).

    The class enters as a projection (Miyato and Koyama 2018, arXiv 1802.05637): logit = w . f + e_class . f, with
    f the pooled features. Noised inputs keep the logits finite where the two distributions do not overlap.
    """

    def __init__(self, channels: int, size: int, *, num_classes: int | None = None, width: int = 32) -> None:
        super().__init__()
        widths = [width]
        while size >> len(widths) >= 4 and widths[-1] < WIDEST * width:
            widths.append(2 * widths[-1])
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.SiLU(), nn.Conv2d(a, b, 3, 2, padding=1), nn.GroupNorm(GROUPS, b))
                for a, b in zip(widths, widths[1:])
            )
        )
        self.mixed = nn.Sequential(nn.SiLU(), nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.SiLU())
        self.last = nn.Linear(widths[-1], 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, widths[-1])
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)  # every class begins with the same logit

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        level = expand(sigma, x_sigma)
        scaled = x_sigma * (1 + level**2).rsqrt()
        level_map = level.log().expand(-1, 1, *x_sigma.shape[2:]) / 4
        features: Tensor = self.mixed(self.blocks(self.first(torch.cat([scaled, level_map], 1)))).mean((2, 3))
        logits: Tensor = self.last(features).squeeze(1)
        if self.classes is None:
            return logits
        projection: Tensor = (self.classes(cond["class_label"]) * features).sum(1)
        return logits + projection

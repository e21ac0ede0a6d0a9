"""The refinement head of latent fields: what an image encoder mixes between neighbouring latents, which no ray can."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config

GROUPS = 8


class RefinementConfig(Config):
    """Shape of the head."""

    width: int = Field(32, ge=GROUPS, le=1024, multiple_of=GROUPS)
    blocks: int = Field(2, ge=1, le=16)  # residual blocks on either side of the attention
    heads: Literal[1, 2, 4, 8] = 4  # of the self-attention


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.layers(x)
        return x + change


class SelfAttention(nn.Module):
    """Each place of a map (B, D, h, w) looks at all others.

    Written out: torch's own kernels differ in the last digit with and without gradients, and an edit by equal words
    is to change nothing at all.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, width)
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enter(self.norm(x).flatten(2).transpose(1, 2))
        query, key, value = tokens.unflatten(-1, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # (B, heads, N, D)
        near = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        mixed = self.leave((near @ value).transpose(1, 2).flatten(2))
        change: Tensor = mixed.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + change


class RefinementHead(nn.Module):
    """Latents (B, C, h, w) as rays gave them to latents as the encoder would have. Begins as the identity."""

    def __init__(self, config: RefinementConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        before = [ResidualBlock(config.width) for _ in range(config.blocks)]
        after = [ResidualBlock(config.width) for _ in range(config.blocks)]
        middle = SelfAttention(config.width, config.heads)
        self.enter = nn.Conv2d(channels, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*before, middle, *after)
        self.leave = nn.Conv2d(config.width, channels, 3, padding=1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor) -> Tensor:
        change: Tensor = self.leave(self.blocks(self.enter(latents)))
        return latents + change

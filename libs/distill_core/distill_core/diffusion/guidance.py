"""Classifier-free guidance, in the one convention of this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Array = Any
Rule = Literal["linear", "patch_norm"]
PATCH = 2


def guide(cond: Array, uncond: Array, guidance: float | Array) -> Array:
    """`guidance` = 1 is the conditional prediction, 0 the unconditional one (Ho & Salimans 2022, w shifted by 1)."""
    return uncond + guidance * (cond - uncond)


def guide_by(
    rule: Rule, cond: Array, uncond: Array, guidance: float | Array, x_sigma: Array, sigma: Array
) -> Array:
    """x0 under guidance of a flow's denoiser, whose velocity is v = (x_sigma - (1 + sigma) x0) / sigma.

    patch_norm: v keeps, over all channels of each patch of 2 x 2, the length that it has with the condition
    (Qwen-Image's pipeline). `sigma` broadcasts against x0 (B, C, H, W); torch tensors and NumPy arrays alike.
    """
    guided = guide(cond, uncond, guidance)
    if rule == "linear":
        return guided
    usual, changed = ((x_sigma - (1 + sigma) * x0) / sigma for x0 in (cond, guided))
    ratio = (_patch_square(usual) / _patch_square(changed)) ** 0.5
    batch, channels, height, width = changed.shape
    patches = changed.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH) * ratio
    return (x_sigma - sigma * patches.reshape(batch, channels, height, width)) / (1 + sigma)


def _patch_square(v: Array) -> Array:
    batch, channels, height, width = v.shape
    patches = v.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return (patches**2).sum((1, 3, 5))[:, None, :, None, :, None]


@dataclass(frozen=True)
class GuidanceLaw:
    """Distribution of a training step's guidance scale: uniform on [`low`, `high`], a scale per sample; or fixed."""

    low: float
    high: float

    @classmethod
    def fixed(cls, guidance: float) -> GuidanceLaw:
        """One scale for every sample of every step."""
        return cls(guidance, guidance)

    def draw(self, like: Array) -> float | Array:
        """The scales (B,) of the batch `like` (B, ...); a fixed law gives its number and draws no randomness."""
        return self.low if self.low == self.high else self.draw_each(like)

    def draw_each(self, like: Array) -> Array:
        """The scales (B,) of the batch `like` (B, ...), as an array whether they differ or not."""
        return like.new_empty(len(like)).uniform_(self.low, self.high)

    @property
    def is_off(self) -> bool:
        """True if no prediction is ever changed."""
        return self.low == self.high == 1

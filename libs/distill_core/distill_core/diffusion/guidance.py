"""Classifier-free guidance, in the one convention of this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any


def guide(cond: Array, uncond: Array, guidance: float | Array) -> Array:
    """`guidance` = 1 is the conditional prediction, 0 the unconditional one (Ho & Salimans 2022, w shifted by 1)."""
    return uncond + guidance * (cond - uncond)


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
        if self.low == self.high:
            return self.low
        return like.new_empty(len(like)).uniform_(self.low, self.high)

    @property
    def is_off(self) -> bool:
        """True if no prediction is ever changed."""
        return self.low == self.high == 1

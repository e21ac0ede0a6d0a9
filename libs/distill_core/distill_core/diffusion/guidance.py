"""Classifier-free guidance, in the one convention of this project."""

from __future__ import annotations

from typing import Any

Array = Any


def guide(cond: Array, uncond: Array, guidance: float | Array) -> Array:
    """`guidance` = 1 is the conditional prediction, 0 the unconditional one (Ho & Salimans 2022, w shifted by 1)."""
    return uncond + guidance * (cond - uncond)

"""All randomness of a run is a function of (seed, step, rank), so a resumed run needs no generator state."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for a purpose, independent of every other purpose's."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

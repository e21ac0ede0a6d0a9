"""Noise that depends on (seed, image index, draw) alone: equal on every backend and in every batch. NumPy only."""

from __future__ import annotations

import math

import numpy as np


def unit_normal(seed: int, index: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of `shape` for image `index` of a request with `seed`, the sampler's draw number `draw`.

    Philox raw bits, 53-bit uniforms, Box-Muller in float64: NumPy keeps raw bit streams stable between versions,
    but not `standard_normal`.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, draw]).random_raw(2 * half)
    uniform = (np.asarray(bits, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:half]))  # log(1 - u): u = 0 is fine, u never reaches 1
    angle = 2.0 * np.pi * uniform[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normal[:count].reshape(shape).astype(np.float32)

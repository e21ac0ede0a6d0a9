"""Noise that depends on (seed, image index, draw) alone: equal on every backend and in every batch. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def unit_normal(seed: int, index: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of `shape` for image `index` of a request with `seed`, the sampler's draw number `draw`.

    Philox raw bits, 53-bit uniforms, Box-Muller in float64: NumPy keeps raw bit streams stable between versions,
    but not `standard_normal`.
    """
    made: np.ndarray = unit_normals([(seed, index)], draw, shape)[0]
    return made


def unit_normals(images: Iterable[tuple[int, int]], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """`unit_normal` of every (seed, index), float32 (B, *shape); to the bit the same, and quicker together."""
    count = math.prod(shape)
    half = (count + 1) // 2
    streams = [np.random.Philox(key=[*image], counter=[0, 0, 0, draw]) for image in images]
    bits = np.stack([np.asarray(stream.random_raw(2 * half), dtype=np.uint64) for stream in streams])
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:, :half]))  # log(1 - u): u = 0 is fine, u never reaches 1
    angle = 2.0 * np.pi * uniform[:, half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal[:, :count].reshape(len(streams), *shape).astype(np.float32)

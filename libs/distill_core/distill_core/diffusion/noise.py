"""Noise that depends on (seed, image index, draw) alone: equal on every backend and in every batch. NumPy only."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

STEP = 2.0**-53  # between neighbouring uniforms


class Drawn(Protocol):
    """An image to make: what its noise depends on, and the draws of it that are made already, or given."""

    @property
    def seed(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def draws(self) -> dict[int, np.ndarray]: ...


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
    bits = np.stack([_stream(image, draw, 2 * half) for image in images])
    bits >>= np.uint64(11)
    uniform = bits.astype(np.float64)  # u is 2^-53 times this; all in place, as memory is what takes time
    radius, angle = uniform[:, :half], uniform[:, half:]
    radius *= -STEP
    np.log1p(radius, out=radius)  # log(1 - u): u = 0 is fine, u never reaches 1
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle *= 2.0 * np.pi * STEP
    normal = np.empty(uniform.shape, np.float32)
    np.multiply(radius, np.cos(angle), out=normal[:, :half], casting="same_kind")
    np.multiply(radius, np.sin(angle), out=normal[:, half:], casting="same_kind")
    return normal[:, :count].reshape(-1, *shape)


def draw_first(items: Sequence[Drawn], shape: tuple[int, ...]) -> None:
    """Draw and keep the first noise of images that were not given theirs."""
    items = [item for item in items if 0 not in item.draws]
    drawn = unit_normals([(item.seed, item.index) for item in items], 0, shape) if items else ()
    for item, noise in zip(items, drawn, strict=True):
        item.draws[0] = noise


def noise_of(items: Sequence[Drawn], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """The `draw`-th noise of each image, (B, *shape)."""
    made = [item.draws.get(draw) for item in items]
    missing = [(item.seed, item.index) for item, there in zip(items, made, strict=True) if there is None]
    drawn = iter(unit_normals(missing, draw, shape) if missing else ())
    return np.stack([next(drawn) if there is None else there for there in made])


class _Stream(threading.local):
    """Philox's raw bits for a key and a draw, from a generator that each thread keeps: a new one takes longer."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=[0, 0])
        self._begin = self._philox.state  # nothing is buffered yet

    def __call__(self, key: tuple[int, int], draw: int, count: int) -> np.ndarray:
        self._begin["state"]["key"][:] = key
        self._begin["state"]["counter"][:] = 0, 0, 0, draw
        self._philox.state = self._begin
        return np.asarray(self._philox.random_raw(count), dtype=np.uint64)


_stream = _Stream()

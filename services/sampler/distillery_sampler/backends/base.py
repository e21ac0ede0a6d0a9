"""What evaluates a model. Backends are called from several model threads and hold no request state."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np

from distill_core.diffusion.noise import unit_normal
from distillery_sampler.requests import ImageItem, ImageKey, Rendered, Tile


class Generator(abc.ABC):
    """A denoiser that is sampled."""

    name: str

    @abc.abstractmethod
    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        """Pictures float32 (B, C, H, W) in [-1, 1]; picture i depends on `key` and `items[i]` alone."""


class SceneRenderer(abc.ABC):
    """A radiance field that is looked at."""

    name: str

    @abc.abstractmethod
    def render(self, tiles: Sequence[Tile], *, normals: bool = False) -> list[Rendered]:
        """Tiles of any views; what a tile shows does not depend on those it is rendered with."""


Backend = Generator | SceneRenderer


def noise(items: Sequence[ImageItem], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """The `draw`-th noise of each item, (B, *shape)."""
    return np.stack([unit_normal(item.seed, item.index, draw, shape) for item in items])

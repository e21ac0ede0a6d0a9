"""What evaluates a model. Backends are called from several model threads and hold no request state."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence

import numpy as np

from distill_core.diffusion.noise import unit_normals
from distillery_sampler.requests import ImageItem, ImageKey, Rendered, Tile


class Generator(abc.ABC):
    """A denoiser that is sampled."""

    name: str
    on_gpu = False

    @abc.abstractmethod
    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        """Pictures float32 (B, C, H, W) in [-1, 1]; picture i depends on `key` and `items[i]` alone."""

    def cuts(self, prompt: str) -> bool:
        """Whether the end of a prompt is left out, as it has more tokens than the model reads."""
        return False

    @abc.abstractmethod
    def held(self) -> dict[Hashable, int]:
        """Bytes of its weights by what holds them; weights that another backend shares have the same key."""


class SceneRenderer(abc.ABC):
    """A radiance field that is looked at."""

    name: str
    on_gpu = False

    @abc.abstractmethod
    def render(self, tiles: Sequence[Tile], *, normals: bool = False) -> list[Rendered]:
        """Tiles of any views; what a tile shows does not depend on those it is rendered with."""

    @abc.abstractmethod
    def held(self) -> dict[Hashable, int]:
        """As a generator's."""


Backend = Generator | SceneRenderer


def noise(items: Sequence[ImageItem], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """The `draw`-th noise of each item, (B, *shape)."""
    made = [item.ahead.get(draw) for item in items]
    missing = [(item.seed, item.index) for item, there in zip(items, made, strict=True) if there is None]
    drawn = iter(unit_normals(missing, draw, shape) if missing else ())
    return np.stack([next(drawn) if there is None else there for there in made])

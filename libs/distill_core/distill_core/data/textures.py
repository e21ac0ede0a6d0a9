"""Procedural textures that repeat without a seam, as pictures or as the maps of a physically based material.

    pattern h(u, v), periodic on the unit square: family and numbers drawn from (seed, family, item) alone
    basecolor = c0 + h (c1 - c0),   height = h or 1 - h,   roughness = r0 + h (r1 - r0),   metallic = 0 or 1
    normal    = (-s dh/dx, -s dh/dy, 1) / |...|, of which x and y are kept

Everything is in tile units, so an item is the same texture at every size.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from distill_core.config import Config as SourceConfig
from distill_core.config import Words
from distill_core.data.source import Source
from distill_core.errors import nearest

MAPS = {  # a material's channels, in order
    "basecolor": slice(0, 3),
    "normal": slice(3, 5),
    "height": slice(5, 6),
    "roughness": slice(6, 7),
    "metallic": slice(7, 8),
}
NUM_CHANNELS = {"grey": 1, "rgb": 3, "materials": 8}
RELIEF = 2.0  # slope of a normal per unit of height and pixel of a tile of 32
KEEP_BYTES = 2**28  # textures drawn before are kept up to this much
Pattern = Callable[[np.random.Generator, int], np.ndarray]


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Parallel bands along any direction that closes on itself."""
    choices = [(a, b) for a in range(5) for b in range(-4, 5) if 4 <= a * a + b * b <= 17 and (a or b > 0)]
    a, b = choices[rng.integers(len(choices))]
    u, v = _grid(size)
    length = np.hypot(a, b)
    phase = (a * u + b * v + rng.random()) % 1.0
    return _inside((np.abs(phase - 0.5) - rng.uniform(0.15, 0.35)) / length, size)


def checks(rng: np.random.Generator, size: int) -> np.ndarray:
    """A chessboard of 4x4, 6x6 or 8x8 fields."""
    n = int(rng.integers(2, 5))
    u, v = _grid(size)
    x, y = ((w * n + rng.random()) % 1.0 for w in (u, v))
    along, across = ((np.abs(w - 0.5) - 0.25) / n for w in (x, y))  # signed distance to the band's edge
    heights: np.ndarray = 1 - np.abs(_inside(along, size) - _inside(across, size))
    return heights


def bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Courses of bricks, every other one moved by half a brick, with mortar between them."""
    rows, columns = 2 * int(rng.integers(1, 3)), int(rng.integers(1, 3))
    u, v = _grid(size)
    u, v = (u + rng.random()) % 1.0, (v + rng.random()) % 1.0
    row = np.floor(v * rows)
    x, y = (u * columns + 0.5 * (row % 2)) % 1.0, v * rows - row
    mortar = rng.uniform(0.04, 0.07)
    edge = np.minimum((0.5 - np.abs(x - 0.5)) / columns, (0.5 - np.abs(y - 0.5)) / rows)
    return 1 - _inside(edge - mortar / 2, size)  # mortar lies low


def dots(rng: np.random.Generator, size: int) -> np.ndarray:
    """Discs on a square grid, or with every other row moved by half a distance."""
    n, shifted = int(rng.integers(2, 5)), 0.5 * int(rng.integers(2))
    n += n % 2 if shifted else 0
    u, v = _grid(size)
    u, v = (u + rng.random()) % 1.0, (v + rng.random()) % 1.0
    row = np.floor(v * n)
    x, y = (u * n + shifted * (row % 2)) % 1.0 - 0.5, v * n - row - 0.5
    return _inside((np.hypot(x, y) - rng.uniform(0.25, 0.4)) / n, size)


def noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fractal clouds: random waves of whole frequencies, their amplitudes falling as a power."""
    top = 12
    frequency = np.hypot(*np.meshgrid(np.arange(-top, top + 1), np.arange(top + 1), indexing="ij"))
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1) ** -rng.uniform(1.3, 2.2), 0)
    wave = amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape))
    u = (np.arange(size) + 0.5) / size
    rows = np.exp(2j * np.pi * np.outer(u, np.arange(-top, top + 1)))
    columns = np.exp(2j * np.pi * np.outer(np.arange(top + 1), u))
    field = (rows @ wave @ columns).real
    scale = np.sqrt(np.square(amplitude).sum() / 2)
    heights: np.ndarray = 0.5 + 0.5 * np.tanh(field / scale)
    return heights


def strokes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Lines of thin strokes like a script: crisp, and full of high frequencies."""
    lines, letters = int(rng.integers(3, 5)), int(rng.integers(4, 6))
    origin = rng.random(2)
    width = rng.uniform(0.03, 0.045)
    distance = np.full((size, size), np.inf)
    for line in range(lines):
        for letter in range(letters):
            cell = np.array([(letter + 0.5) / letters, (line + 0.5) / lines])
            for _ in range(2):
                ends = rng.uniform(-0.38, 0.38, (2, 2)) / (letters, lines)
                distance = np.minimum(distance, _to_segment(origin + cell + ends, size))
    return 1 - _inside(distance - width / 2, size)


FAMILIES: dict[str, Pattern] = {
    pattern.__name__: pattern for pattern in (stripes, checks, bricks, dots, noise, strokes)
}


def normals(height: Tensor) -> Tensor:
    """The x and y of the unit normals (B, 2, H, W) of periodic `height` (B, 1, H, W) in [-1, 1].

    Central differences around the wrap edge; y grows with the row.
    """
    slope = RELIEF / 4 * height.shape[-1] / 32
    dx = slope * (height.roll(-1, 3) - height.roll(1, 3))
    dy = slope * (height.roll(-1, 2) - height.roll(1, 2))
    return -torch.cat([dx, dy], 1) * (1 + dx.square() + dy.square()).rsqrt()


class Textures(Source):
    """Textures of several families, which are the classes, in turn."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["textures"] = "textures"
        size: int = Field(32, ge=8, le=512)  # pixels a side
        kind: Literal["grey", "rgb", "materials"] = "rgb"  # materials: the 8 channels of MAPS
        families: tuple[Words, ...] = tuple(FAMILIES)  # the classes, in order
        only: tuple[Words, ...] = ()  # give items of these families alone; the classes stay. () = all
        window: float = Field(
            1.0, gt=0, le=1
        )  # share of the tile's side shown; below 1 a picture does not repeat
        count: int = Field(3000, ge=1, le=10_000_000)
        seed: int = Field(0, ge=0, lt=2**63)  # another seed, other textures: a held-out set

        @field_validator("families", "only")
        @classmethod
        def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
            for name in names:
                if name not in FAMILIES:
                    raise ValueError(f"no family of textures is called {name!r}{nearest(name, FAMILIES)}")
            if len(set(names)) != len(names):
                raise ValueError("a family may be named once")
            return names

        @model_validator(mode="after")
        def _subset(self) -> Textures.Config:
            if len(self.families) < 2:
                raise ValueError("families needs at least two names: they are the classes")
            if missing := sorted(set(self.only) - set(self.families)):
                raise ValueError(f"only names {missing[0]!r}, which is not among the families")
            return self

    def __init__(self, config: Config) -> None:
        kept = config.only or config.families
        labels = torch.tensor([config.families.index(name) for name in kept], dtype=torch.int64)
        super().__init__(
            config,
            size=config.count,
            pixels=_DrawnPixels(config, kept),
            labels=labels[torch.arange(config.count) % len(kept)],
            class_names=config.families,
        )


class _DrawnPixels:
    """Textures by index, drawn when first asked for."""

    def __init__(self, config: Textures.Config, kept: tuple[str, ...]) -> None:
        self.config, self.kept = config, kept
        self.shape = NUM_CHANNELS[config.kind], config.size, config.size
        self.tile_size = round(config.size / config.window)
        item_bytes = 4 * self.shape[0] * config.size**2
        self._drawn = functools.lru_cache(maxsize=KEEP_BYTES // item_bytes)(self._draw)

    def __len__(self) -> int:
        return self.config.count

    def take(self, indices: Tensor) -> Tensor:
        return torch.stack([self._drawn(index) for index in indices.tolist()])

    def _draw(self, index: int) -> Tensor:
        number, place = divmod(index, len(self.kept))
        maps = material(self.kept[place], number, size=self.tile_size, seed=self.config.seed)
        maps = maps[:, : self.config.size, : self.config.size].clone()
        if self.config.kind == "materials":
            return maps
        picture = maps[MAPS["basecolor"]]
        return picture if self.config.kind == "rgb" else picture.mean(0, keepdim=True)


def material(family: str, number: int, *, size: int, seed: int = 0) -> Tensor:
    """The maps (8, H, W) in [-1, 1] of one texture; its picture is their basecolor."""
    key = [seed, list(FAMILIES).index(family) << 48 | number]
    rng = np.random.Generator(np.random.Philox(key=key))
    metallic = float(rng.random() < 0.3)
    low, high = _two_colours(rng, metallic)
    r0, r1 = rng.uniform(0.05, 0.95, 2)
    h = torch.from_numpy(FAMILIES[family](rng, size).astype(np.float32))[None]
    height = (2 * h - 1) * float(rng.choice([-1, 1]))  # embossed or engraved: no picture tells
    maps = [
        2 * (low + h * (high - low)) - 1,
        normals(height[None])[0],
        height,
        2 * (r0 + h * (r1 - r0)) - 1,
        torch.full_like(h, 2 * metallic - 1),
    ]
    return torch.cat(maps)


def _two_colours(rng: np.random.Generator, metallic: float) -> tuple[Tensor, Tensor]:
    """Colours of the pattern's low and high parts (3, 1, 1), one dark and one light; metals are nearly grey."""
    values = rng.uniform(0.05, 0.4), rng.uniform(0.6, 1.0)
    saturation = 0.1 if metallic else 0.6
    dark, light = (
        torch.tensor(colorsys.hsv_to_rgb(rng.random(), saturation * rng.random(), value))[:, None, None]
        for value in values
    )
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The u along the columns and v along the rows, (H, W) each: pixel centres of the unit tile."""
    centres = (np.arange(size) + 0.5) / size
    v, u = np.meshgrid(centres, centres, indexing="ij")
    return u, v


def _inside(distance: np.ndarray, size: int) -> np.ndarray:
    """1 where the signed distance (tile units) is negative, 0 outside, with an edge of one pixel."""
    return np.clip(0.5 - distance * size, 0, 1)


def _to_segment(ends: np.ndarray, size: int) -> np.ndarray:
    """Distance (H, W) of each pixel to the nearest copy of a segment, `ends` (2, 2) as (u, v)."""
    pixels = np.stack(_grid(size), -1)
    middle, half = ends.mean(0), (ends[1] - ends[0]) / 2
    offset = (pixels - middle + 0.5) % 1.0 - 0.5  # the nearest copy of the middle, and so of a short segment
    along = np.clip(offset @ half / max(half @ half, 1e-12), -1, 1)
    distance: np.ndarray = np.hypot(*np.moveaxis(offset - along[..., None] * half, -1, 0))
    return distance


SOURCES = {"textures": Textures}

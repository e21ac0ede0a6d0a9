"""Coloured shapes, 16x16, with their prompts: pictures that words decide, from no file at all."""

from __future__ import annotations

import functools
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from distill_core.config import Config as SourceConfig
from distill_core.data.source import Source

SIDE = 16  # pixels
COLOURS = {  # RGB in [-1, 1]; the background is black
    "red": (1.0, -0.8, -0.8),
    "green": (-0.8, 1.0, -0.8),
    "blue": (-0.8, -0.6, 1.0),
    "yellow": (1.0, 0.9, -0.8),
}
SHAPES = ("circle", "square", "triangle", "cross")
RADIUS = 4.5, 6.0  # pixels, least and greatest
JITTER = 1.5  # pixels, of the centre to each side
Colour = Literal["red", "green", "blue", "yellow"]
Shape = Literal["circle", "square", "triangle", "cross"]


class Shapes(Source):
    """One shape of one colour per picture, its size and place drawn; the label is colour and shape together.

    Item i depends on the seed and i alone. The classes come in turn, so each is equally often there.
    """

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["shapes"] = "shapes"
        count: int = Field(4096, ge=1, le=1_000_000)
        colours: tuple[Colour, ...] = ("red", "green", "blue")
        shapes: tuple[Shape, ...] = ("circle", "triangle", "cross")
        no_colour: float = Field(0.25, ge=0, le=1)  # share of prompts that name the shape alone
        no_shape: float = Field(0.1, ge=0, le=1)  # share of prompts that name the colour alone
        seed: int = Field(0, ge=0, lt=2**63)

        @field_validator("colours", "shapes")
        @classmethod
        def _each_once(cls, words: tuple[str, ...]) -> tuple[str, ...]:
            if not words or len(set(words)) < len(words):
                raise ValueError("give at least one, and each once")
            return words

        @model_validator(mode="after")
        def _shares(self) -> Self:
            if self.no_colour + self.no_shape > 1:
                raise ValueError("no_colour and no_shape are shares of the same prompts: together at most 1")
            return self

    def __init__(self, config: Config) -> None:
        self.words = [(colour, shape) for colour in config.colours for shape in config.shapes]
        drawn = np.random.Generator(np.random.Philox(config.seed)).random((config.count, 4))
        labels = torch.arange(config.count) % len(self.words)
        super().__init__(
            config,
            size=config.count,
            pixels=_Drawing(self.words, labels, torch.from_numpy(drawn[:, :3]).float()),
            labels=labels,
            class_names=tuple(" ".join(words) for words in self.words),
            prompts=[_prompt(self.words[label], u, config) for label, u in zip(labels.tolist(), drawn[:, 3])],
        )

    def recognise(self, pictures: Tensor) -> Tensor:
        """The labels (B,) of pictures (B, 3, 16, 16): nearest colour, and the shape that covers them best."""
        pictures = pictures.float().cpu()
        cover = ((pictures + 1) / 2).amax(1).clamp(0, 1)  # black is background
        mean = (pictures * cover[:, None]).sum((2, 3)) / cover.sum((1, 2)).clamp_min(1e-6)[:, None]
        colours = list(dict.fromkeys(colour for colour, _ in self.words))
        shapes = list(dict.fromkeys(shape for _, shape in self.words))
        colour = torch.cdist(mean, torch.tensor([COLOURS[name] for name in colours])).argmin(1)
        masks, owner = _templates(tuple(shapes))
        shape = owner[torch.cdist(cover.flatten(1), masks).argmin(1)]
        return colour * len(shapes) + shape


class _Drawing:
    """Pictures drawn when they are asked for."""

    shape = (3, SIDE, SIDE)

    def __init__(self, words: list[tuple[Colour, Shape]], labels: Tensor, drawn: Tensor) -> None:
        self.words, self.labels, self.drawn = words, labels, drawn

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Tensor:
        radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * self.drawn[indices, 0]
        centre = SIDE / 2 + JITTER * (2 * self.drawn[indices, 1:] - 1)
        labels = self.labels[indices]
        cover = torch.empty(len(indices), SIDE, SIDE)
        colour = torch.tensor([COLOURS[self.words[label][0]] for label in labels.tolist()])
        for name in SHAPES:
            chosen = torch.tensor([self.words[label][1] == name for label in labels.tolist()])
            cover[chosen] = coverage(name, centre[chosen], radius[chosen])
        return cover[:, None] * (colour[:, :, None, None] + 1) - 1


def coverage(shape: str, centre: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel (B, 16, 16) inside the shape at `centre` (B, 2), x and y in pixels, y down."""
    pixel = torch.arange(SIDE) + 0.5
    x = pixel[None, None, :] - centre[:, 0, None, None]
    y = pixel[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - r
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.85 * r
    elif shape == "triangle":
        distance = torch.maximum(y - 0.7 * r, 0.87 * x.abs() - 0.5 * y - 0.6 * r)
    else:
        near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        distance = torch.maximum(near - 0.3 * r, far - r)
    return (0.5 - distance).clamp(0, 1)


@functools.cache
def _templates(shapes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Coverages (T, 256) of every shape at half-pixel places and sizes, and the shape (T,) of each."""
    places = torch.arange(SIDE / 2 - JITTER - 1, SIDE / 2 + JITTER + 1.01, 0.5)
    sizes = torch.arange(RADIUS[0] - 0.5, RADIUS[1] + 0.51, 0.5)
    grid = torch.cartesian_prod(places, places, sizes)
    masks = [coverage(shape, grid[:, :2], grid[:, 2]).flatten(1) for shape in shapes]
    return torch.cat(masks), torch.arange(len(shapes)).repeat_interleave(len(grid))


def _prompt(words: tuple[str, str], u: float, config: Shapes.Config) -> str:
    colour, shape = words
    if u < config.no_colour:
        return shape
    return colour if u < config.no_colour + config.no_shape else f"{colour} {shape}"


SOURCES = {"shapes": Shapes}

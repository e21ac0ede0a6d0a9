"""Cluttered digits: a whole digit and fragments of others on a larger canvas, so that crops may miss it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from distill_core.config import Config as SourceConfig
from distill_core.config import Seed
from distill_core.data.digits import Digits
from distill_core.data.source import ArrayPixels, Source

SIDE = 8  # pixels of a digit
FRAGMENT = 5  # pixels of a piece of another
TRIES = 50  # places that are looked at for a piece that does not touch the digit


class ClutteredDigits(Source):
    """(1, size, size) pictures and the one digit that is whole in each."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["cluttered_digits"] = "cluttered_digits"
        split: Literal["all", "train", "test"] = "all"  # of the digits, a fixed 80/20 split of every class
        size: int = Field(24, ge=16, le=64)  # side of the canvas, pixels
        fragments: int = Field(2, ge=0, le=8)  # pieces of other digits
        clutter_seed: Seed = 0  # of places and pieces

    def __init__(self, config: Config) -> None:
        digits = Digits(Digits.Config(split=config.split))
        assert isinstance(digits.pixels, ArrayPixels)
        pictures = digits.pixels.values.numpy()[:, 0]
        canvases = [_canvas(pictures, item, config) for item in range(digits.size)]
        super().__init__(
            config,
            size=digits.size,
            pixels=ArrayPixels(torch.from_numpy(np.stack(canvases)[:, None])),
            labels=digits.labels,
            class_names=digits.class_names,
        )


def _canvas(pictures: np.ndarray, item: int, config: ClutteredDigits.Config) -> np.ndarray:
    """The canvas (size, size) of one item, a function of it and the options."""
    random = np.random.Generator(np.random.Philox([config.clutter_seed, item]))
    canvas: np.ndarray = np.full((config.size, config.size), -1, dtype=np.float32)
    top, left = random.integers(0, config.size - SIDE + 1, 2)
    for _ in range(config.fragments):
        other = pictures[random.integers(len(pictures))]
        row, column = random.integers(0, SIDE - FRAGMENT + 1, 2)
        for y, x in random.integers(0, config.size - FRAGMENT + 1, (TRIES, 2)):
            if y + FRAGMENT <= top or y >= top + SIDE or x + FRAGMENT <= left or x >= left + SIDE:
                canvas[y : y + FRAGMENT, x : x + FRAGMENT] = other[
                    row : row + FRAGMENT, column : column + FRAGMENT
                ]
                break
    canvas[top : top + SIDE, left : left + SIDE] = pictures[item]
    return canvas


SOURCES = {"cluttered_digits": ClutteredDigits}

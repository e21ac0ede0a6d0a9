"""A model's answer to one fixed question, small enough for its manifest: a server of it compares. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from distill_core.config import Config

SEED = 1
CELLS = 8  # a side, at most
VIEW_SIDE = 16  # pixels of a scene's view
VIEW_DEGREES = 30.0  # azimuth and elevation of its camera, at the scene's usual distance


class ParitySample(Config):
    """Mean and spread of the cells that a picture is cut into: a few numbers that no change of backend moves far.

    A denoiser's picture is of noise (seed, image 0), its fewest steps and no guidance; a field's a small view.
    """

    seed: int = Field(SEED, ge=0)
    num_steps: int = Field(1, ge=1)
    class_label: int | None = None
    prompt: str | None = None
    shape: tuple[int, int, int]  # channels, rows and columns of cells
    means: tuple[float, ...] = Field(max_length=64 * CELLS**2)
    spreads: tuple[float, ...] = Field(max_length=64 * CELLS**2)  # standard deviation inside each cell

    @model_validator(mode="after")
    def _lengths(self) -> ParitySample:
        if not len(self.means) == len(self.spreads) == int(np.prod(self.shape)):
            raise ValueError(f"a parity sample of shape {self.shape} needs as many means and spreads")
        return self

    @classmethod
    def of(cls, picture: np.ndarray, **question: Any) -> ParitySample:
        """The sample of a picture (C, H, W); `question` is what it was made with."""
        shape, means, spreads = _cells(picture)
        return cls(shape=shape, means=means, spreads=spreads, **question)

    def difference(self, picture: np.ndarray) -> float:
        """The largest difference of a cell's mean or spread, in units of the picture; infinite for other cells."""
        shape, means, spreads = _cells(picture)
        if shape != self.shape:
            return float("inf")
        return float(np.abs(np.subtract([means, spreads], [self.means, self.spreads])).max())


def _cells(picture: np.ndarray) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]:
    """The cells' shape, means and spreads, rounded to what matters."""
    rows = np.array_split(picture.astype(np.float64), min(CELLS, picture.shape[1]), axis=1)
    cells = [np.array_split(row, min(CELLS, picture.shape[2]), axis=2) for row in rows]
    means, spreads = (
        np.stack([np.stack([measure(cell, axis=(1, 2)) for cell in row], 1) for row in cells], 1).round(6)
        for measure in (np.mean, np.std)
    )
    channels, height, width = means.shape
    return (channels, height, width), tuple(means.ravel().tolist()), tuple(spreads.ravel().tolist())

"""Scikit-learn's 1,797 handwritten digits, 8x8, part of its package: real data that needs no download."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from distill_core.config import Config as SourceConfig
from distill_core.data.source import ArrayPixels, Source
from distill_core.errors import missing_package


class Digits(Source):
    """(1, 8, 8) pictures and their digit."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["digits"] = "digits"
        split: Literal["all", "train", "test"] = "all"  # a fixed 80/20 split of every class
        only: tuple[Annotated[int, Field(ge=0, le=9)], ...] = ()  # of these digits; () = of all ten
        labelled: bool = True  # False: pictures alone, for models without a condition

    def __init__(self, config: Config) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise missing_package("scikit-learn", "train") from None
        images, labels = load_digits(return_X_y=True)
        chosen = _split(labels, config.split)
        if config.only:
            chosen = chosen[np.isin(labels[chosen], config.only)]
        x0 = torch.from_numpy((images[chosen] / 8 - 1).astype(np.float32)).reshape(
            -1, 1, 8, 8
        )  # values are 0..16
        super().__init__(
            config,
            size=len(chosen),
            pixels=ArrayPixels(x0),
            labels=torch.from_numpy(labels[chosen].astype(np.int64)) if config.labelled else None,
            class_names=tuple("0123456789") if config.labelled else (),
        )


def _split(labels: np.ndarray, split: str) -> np.ndarray:
    if split == "all":
        return np.arange(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    shuffle = np.random.Generator(np.random.Philox(0))
    for label in np.unique(labels):
        items = shuffle.permutation(np.flatnonzero(labels == label))
        held_out[items[: round(0.2 * len(items))]] = True
    return np.flatnonzero(held_out if split == "test" else ~held_out)


SOURCES = {"digits": Digits}

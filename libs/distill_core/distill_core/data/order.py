"""Order in which items are drawn, and how each is seen: pure functions of (seed, position), so resuming is exact.

`[data.order]` chooses the order, `[data.view]` the augmentation. Epoch e is a permutation seeded by (seed, e).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill_core.config import Config
from distill_core.errors import ConfigError

MAX_BATCH = 1_000_000


class OrderConfig(Config):
    """Order of the items of a data set.

    endless: a new permutation each epoch. static: epochs over one random subset. rounds: epochs over a fresh subset
    each, without replacement (consecutive slices of the endless order) or with it (each round drawn by itself).
    per_class: a batch holds equally many items of each class.
    """

    kind: Literal["endless", "static", "rounds", "per_class"] = "endless"
    share: float = Field(1.0, gt=0, le=1)  # of the items in the subset, for static and rounds
    replacement: bool = False  # for rounds: whether a round may repeat what earlier ones had
    stratified: bool = False  # whether the subset holds that share of each class

    @model_validator(mode="after")
    def _used(self) -> Self:
        subset = self.kind in ("static", "rounds")
        if not subset and (self.share != 1 or self.stratified):
            raise ValueError(f"order.kind = '{self.kind}' takes no subset; leave share and stratified out")
        if self.replacement and self.kind != "rounds":
            raise ValueError(f"order.kind = '{self.kind}' has no rounds; leave replacement out")
        if self.stratified and self.kind == "rounds" and not self.replacement:
            raise ValueError("stratified rounds are drawn with replacement; set order.replacement = true")
        return self


class Order:
    """The items at positions of the endless stream over a data set of `size` items with class `labels` (N,)."""

    def __init__(self, config: OrderConfig, size: int, labels: Tensor | None = None) -> None:
        self.config, self.size, self.labels = config, size, labels
        if labels is None and (config.stratified or config.kind == "per_class"):
            raise ConfigError(
                "this order needs class labels, and the data has none; choose labelled data",
                field="data.order",
            )
        self._at: Callable[[int, int, int], Tensor] = {
            "endless": self._endless,
            "static": self._static,
            "rounds": self._rounds if config.replacement else self._endless,
            "per_class": self._per_class,
        }[config.kind]

    def at(self, seed: int, start: int, stop: int) -> Tensor:
        """Indices (stop - start,) of the items at these positions."""
        if not 1 <= stop - start <= MAX_BATCH or start < 0:
            raise ConfigError(
                f"batch of {stop - start} items at position {start}: allowed are 1 to {MAX_BATCH} and >= 0"
            )
        return self._at(seed, start, stop)

    @property
    def epoch(self) -> int:
        """Items of one epoch: the whole set, or the subset of one round."""
        return self.size if self.config.kind in ("endless", "per_class") else self._count

    @property
    def _count(self) -> int:
        return max(1, round(self.config.share * self.size))

    def _endless(self, seed: int, start: int, stop: int) -> Tensor:
        return _slices(start, stop, self.size, lambda epoch: permutation(self.size, seed, epoch))

    def _static(self, seed: int, start: int, stop: int) -> Tensor:
        chosen = self._subset(seed, 0)
        return _slices(start, stop, len(chosen), lambda epoch: chosen[permutation(len(chosen), seed, epoch)])

    def _rounds(self, seed: int, start: int, stop: int) -> Tensor:
        length = len(self._subset(seed, 0))
        return _slices(start, stop, length, lambda epoch: self._subset(seed, epoch))

    def _per_class(self, seed: int, start: int, stop: int) -> Tensor:
        assert self.labels is not None
        classes = self.labels.unique()
        members = [(self.labels == label).nonzero().squeeze(1) for label in classes]
        found = torch.empty(stop - start, dtype=torch.long)
        for turn, items in enumerate(members):
            first = -(-(start - turn) // len(classes))  # of this class' own positions
            last = -(-(stop - turn) // len(classes))
            if last > first:
                own = _slices(first, last, len(items), functools.partial(permutation, len(items), seed))
                found[first * len(classes) + turn - start :: len(classes)][: last - first] = items[own]
        return found

    def _subset(self, seed: int, number: int) -> Tensor:
        """The items of the subset `number`, in random order."""
        if not self.config.stratified:
            return permutation(self.size, seed, number)[: self._count]
        assert self.labels is not None
        shuffled = permutation(self.size, seed, number)
        parts = []
        for label in self.labels.unique():
            members = shuffled[self.labels[shuffled] == label]
            parts.append(members[: max(1, round(self.config.share * len(members)))])
        chosen = torch.cat(parts)
        return chosen[permutation(len(chosen), seed, number)]


def _slices(start: int, stop: int, size: int, epoch_of: Callable[[int], Tensor]) -> Tensor:
    """Positions `start` to `stop` of endless epochs of `size` items."""
    parts = []
    while start < stop:
        epoch, offset = divmod(start, size)
        part = epoch_of(epoch)[offset : offset + stop - start]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)  # consecutive batches read the same epoch
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation (size,) of 0 … size - 1, a function of its arguments alone."""
    return torch.from_numpy(np.random.Generator(np.random.Philox([seed, epoch])).permutation(size))

"""Epochs of a run, and weights that change with them: functions of the step alone, so that resuming is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Course = Literal["linear", "constant"]


@dataclass(frozen=True)
class Epochs:
    """Epochs of a run of `steps` steps of `batch_size` items, over `items` of them."""

    items: int
    batch_size: int
    steps: int

    @property
    def count(self) -> int:
        """How many there are, the last perhaps unfinished."""
        return math.ceil(self.steps * self.batch_size / self.items)

    def of(self, step: int) -> int:
        """The epoch, from 0, of the first item of a step."""
        return min(step * self.batch_size // self.items, self.count - 1)

    def weight(self, last: float, step: int, course: Course = "linear") -> float:
        """A weight that grows by epoch to `last` in the last one: last (e + 1) / E; or always `last`."""
        return last if course == "constant" else last * (self.of(step) + 1) / self.count

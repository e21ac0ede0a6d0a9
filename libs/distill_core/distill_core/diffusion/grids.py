"""Grids of noise levels l_0 > l_1 > … > l_N = 0 on which trajectories are distilled, and their segments.

Interval i leads from l_i to l_{i+1}. K segments part the N intervals evenly; the end of interval i's segment is the
least boundary b = k N / K above i, so that end <= i + 1's level < l_i for every interval and every K that divides N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelGrid:
    """Levels in descending order, data std, the last of them 0."""

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            len(self.levels) < 2
            or self.levels[-1] != 0
            or list(self.levels) != sorted(set(self.levels), reverse=True)
        ):
            raise ValueError("a grid's levels descend to 0")

    def __len__(self) -> int:
        """N, the number of intervals."""
        return len(self.levels) - 1

    def draw(self, count: int, device: torch.device | None = None) -> Tensor:
        """(count,) intervals, uniform on 0 to N - 1, by torch's global generator."""
        return torch.randint(len(self), (count,), device=device)

    def at(self, index: Tensor) -> Tensor:
        """The levels (B,) at `index` (B,), 0 to N."""
        return torch.tensor(self.levels, device=index.device)[index]

    def coarse(self, count: int) -> LevelGrid:
        """Every (N / count)-th level: the grid of `count` steps, each over as many intervals.

        Raises:
            ValueError: `count` does not divide N.
        """
        return LevelGrid(self.levels[:: self._stride(count)])

    def starts(self, count: int) -> tuple[float, ...]:
        """Levels at which `count` steps begin: every (N / count)-th, or where that is no integer the one before."""
        return tuple(self.levels[index * len(self) // count] for index in range(count))

    def segment_end(self, index: Tensor, segments: int) -> Tensor:
        """Index (B,) of the level at which the segment of interval `index` (B,) ends."""
        stride = self._stride(segments)
        return (index // stride + 1) * stride

    def inner_end(self, index: Tensor, segments: int) -> Tensor:
        """Index (B,) of a level between interval `index`'s own end and its segment's, uniform, both included."""
        first, last = index + 1, self.segment_end(index, segments)
        share = torch.rand(index.shape, device=index.device)
        return torch.minimum(first + (share * (last - first + 1)).long(), last)

    def _stride(self, count: int) -> int:
        if count < 1 or len(self) % count:
            raise ValueError(f"{len(self)} intervals do not part into {count}")
        return len(self) // count


def check_segments(segments: tuple[int, ...], num_levels: int) -> None:
    """Refuse numbers of segments that do not part a grid of `num_levels`, or do not fall from stage to stage.

    Raises:
        ValueError: they do not.
    """
    if list(segments) != sorted(set(segments), reverse=True) or segments[-1] < 1:
        raise ValueError("segments must be positive and strictly descending, e.g. [8, 4, 2]")
    if any(num_levels % count for count in segments):
        raise ValueError(f"segments must divide num_levels = {num_levels}, e.g. [8, 4, 2] and 32")

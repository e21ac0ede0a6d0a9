"""Batches of a run by step, read ahead where the recipe says so; not a bit of them depends on that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from distill_core.data.prefetch import Prefetch
from distill_core.data.source import Source
from distill_core.method import Batch
from distill_core.recipe import Recipe
from distill_core.training.seeding import derive


@dataclass(frozen=True)
class Draw:
    """Which micro-batches a step has: how many in this process, and the further data sets that give to each."""

    accumulate: int
    streams: Mapping[str, Source] = field(default_factory=dict)

    def like(self, other: Draw | None) -> bool:
        """Whether both number the same batches, so that what was read for the one serves the other."""
        return other is not None and (self.accumulate, [*self.streams]) == (
            other.accumulate,
            [*other.streams],
        )


class Batches:
    """Micro-batches of one process: of each source number `position`, a function of (seed, position, rank)."""

    def __init__(self, source: Source, recipe: Recipe, *, rank: int, world: int) -> None:
        self.source, self.recipe, self.rank, self.world = source, recipe, rank, world
        self._reading: contextlib.ExitStack | None = None  # while batches are read ahead
        self._prefetch: Prefetch[Batch] | None = None
        self._draw: Draw | None = None

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Read the batches of the next steps while this one works; at the end no thread is left."""
        with contextlib.ExitStack() as self._reading:
            try:
                yield
            finally:
                self._reading, self._prefetch, self._draw = None, None, None

    def of(self, step: int, draw: Draw) -> list[Batch]:
        """The micro-batches of a step. What a model encodes is made here, in the caller's thread."""
        numbers = range(step * draw.accumulate, (step + 1) * draw.accumulate)
        if self._reading is None or not self.recipe.prefetch:
            return [self._conditioned(self._read(number, draw), draw) for number in numbers]
        if self._prefetch is None or not draw.like(self._draw):
            self._reading.close()  # what was read for another stage or split is let go
            stop = self.recipe.steps * draw.accumulate
            reading = Prefetch(lambda n: self._read(n, draw), ahead=self.recipe.prefetch, stop=stop)
            self._prefetch, self._draw = self._reading.enter_context(reading), draw
        return [self._conditioned(self._prefetch.take(number), draw) for number in numbers]

    def _read(self, number: int, draw: Draw) -> Batch:
        """Micro-batch `number` of this process, without what a model encodes; any thread may call."""
        seed, position = self.recipe.seed, number * self.world + self.rank
        size = self.recipe.batch_size // (draw.accumulate * self.world)
        also = {
            name: source.read(size, epoch_seed=derive(seed, "stream", name), position=position)
            for name, source in draw.streams.items()
        }
        return replace(self.source.read(size, epoch_seed=seed, position=position), also=also)

    def _conditioned(self, batch: Batch, draw: Draw) -> Batch:
        also = {name: draw.streams[name].conditioned(other) for name, other in batch.also.items()}
        return replace(self.source.conditioned(batch), also=also)

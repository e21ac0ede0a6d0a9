"""Batches for a GPU: batches of a few fixed sizes, and one thread that all its calls come from. Knows no library."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distillery_sampler.backends.base import Functions, Generator
from distillery_sampler.engine.requests import ImageItem, ImageKey

BUCKETS = (1, 2, 4, 8, 16, 32)  # of a GPU


class Padded(Generator):
    """Runs batches of `sizes` only: a smaller one is filled up with its last item, whose copies are thrown away."""

    def __init__(self, inner: Generator, sizes: Sequence[int]) -> None:
        self.inner, self.sizes = inner, tuple(sizes)
        self.name, self.on_gpu = inner.name, inner.on_gpu
        self.on_padding: Callable[[int], None] = lambda _images: None  # told how many images were filling

    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        parts = filled(items, self.sizes, self.on_padding)
        return np.concatenate([self.inner.generate(key, part)[:count] for part, count in parts])

    def cuts(self, prompt: str) -> bool:
        return self.inner.cuts(prompt)

    def held(self) -> dict[Hashable, int]:
        return self.inner.held()


class PaddedFunctions(Functions):
    """The same for functions; a request that is one call keeps its size."""

    def __init__(self, inner: Functions, sizes: Sequence[int]) -> None:
        super().__init__(inner.signature)
        self.inner, self.sizes = inner, tuple(sizes)
        self.name, self.on_gpu = inner.name, inner.on_gpu
        self.on_padding: Callable[[int], None] = lambda _items: None

    def call(self, function: str, items: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        parts = filled(items, self.sizes, self.on_padding)
        return [one for part, count in parts for one in self.inner.call(function, part)[:count]]

    def _run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.inner.run(function, inputs)

    def held(self) -> dict[Hashable, int]:
        return self.inner.held()


class OneThread(Generator):
    """A backend that is opened and called in a thread of its own, as CUDA graphs and execution contexts want it."""

    def __init__(self, open_inner: Callable[[], Generator]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._inner = self._thread.submit(open_inner).result()
        self.name, self.on_gpu = self._inner.name, self._inner.on_gpu

    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        return self._thread.submit(self._inner.generate, key, items).result()

    def cuts(self, prompt: str) -> bool:
        return self._inner.cuts(prompt)

    def held(self) -> dict[Hashable, int]:
        return self._inner.held()


def filled(
    items: Sequence[Any], sizes: Sequence[int], on_padding: Callable[[int], None]
) -> Iterator[tuple[list[Any], int]]:
    """Parts of `items`, each filled up to one of `sizes` with copies of its last item, and how long it was before."""
    for first in range(0, len(items), sizes[-1]):
        part = items[first : first + sizes[-1]]
        filling = next(size for size in sizes if size >= len(part)) - len(part)
        if filling:
            on_padding(filling)
        yield [*part, *[part[-1]] * filling], len(part)

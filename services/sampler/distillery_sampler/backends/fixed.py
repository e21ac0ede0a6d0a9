"""What a GPU wants: batches of a few fixed sizes, and one thread that all its calls come from. Knows no library."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from distillery_sampler.backends.base import Generator
from distillery_sampler.requests import ImageItem, ImageKey

BUCKETS = (1, 2, 4, 8, 16, 32)  # of a GPU


class Padded(Generator):
    """Runs batches of `sizes` only: a smaller one is filled up with its last item, whose copies are thrown away."""

    def __init__(self, inner: Generator, sizes: Sequence[int]) -> None:
        self.inner, self.sizes = inner, tuple(sizes)
        self.name, self.on_gpu = inner.name, inner.on_gpu
        self.on_padding: Callable[[int], None] = lambda _images: None  # told how many images were filling

    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        largest = self.sizes[-1]
        parts = [items[first : first + largest] for first in range(0, len(items), largest)]
        return np.concatenate([self._filled(key, part) for part in parts])

    def cuts(self, prompt: str) -> bool:
        return self.inner.cuts(prompt)

    def held(self) -> dict[Hashable, int]:
        return self.inner.held()

    def _filled(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        size = next(size for size in self.sizes if size >= len(items))
        filling = size - len(items)
        if filling:
            self.on_padding(filling)
        return self.inner.generate(key, [*items, *[items[-1]] * filling])[: len(items)]


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

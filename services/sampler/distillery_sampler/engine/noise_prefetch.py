"""Noise prefetch: the first noise of images, drawn before their turn comes, as model threads are to run models."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from queue import SimpleQueue

from distill_core.diffusion.noise import draw_first
from distillery_sampler.engine.requests import ImageItem

AT_ONCE = (
    16  # images: NumPy lets go of the interpreter in every operation, and under load waits to get it back
)
QUICK_VALUES = 2**13  # drawn in less than 0.2 ms
MAX_REQUESTS = 1024  # images that wait for it: callers may come and go faster than it draws
Shape = tuple[int, ...]


class NoisePrefetch:
    """Draws noise in a thread of its own, in the order of the requests, while the device is busy.

    An image whose turn comes before that gets its noise then.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[ImageItem, Shape] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name="noise-prefetch", daemon=True).start()

    def request(self, items: Sequence[ImageItem], shape: Shape) -> None:
        """Draw for those of these images that were not given their noise, each of `shape`, as far as there is room."""
        for item in items:
            if 0 not in item.draws and self._requests.qsize() < MAX_REQUESTS:
                self._requests.put((item, shape))

    def close(self) -> None:
        """Stop; what is asked for already may still be drawn."""
        self._requests.put(None)

    def _serve(self) -> None:
        while True:
            requests = [self._requests.get()]
            while not self._requests.empty() and len(requests) < AT_ONCE:
                requests.append(self._requests.get())
            for shape in dict.fromkeys(one[1] for one in requests if one):
                with contextlib.suppress(MemoryError):  # then they draw in their turn
                    draw_first([one[0] for one in requests if one and one[1] == shape], shape)
            if None in requests:
                return

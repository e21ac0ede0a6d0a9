"""The first noise of images before their turn comes: model threads are to run models."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from queue import SimpleQueue

from distill_core.diffusion.noise import unit_normals
from distillery_sampler.engine.requests import ImageItem

AT_ONCE = (
    16  # images: NumPy lets go of the interpreter in every operation, and under load waits to get it back
)
QUICK_VALUES = 2**13  # drawn in less than 0.2 ms
MOST_ASKED = 1024  # images that wait for it: callers may come and go faster than it draws
Shape = tuple[int, ...]


class DrawAhead:
    """Draws in a thread of its own, in the order in which it is asked, while the device is busy.

    An image whose turn comes before that gets its noise then.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[ImageItem, Shape] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name="draw-ahead", daemon=True).start()

    def ask(self, items: Sequence[ImageItem], shape: Shape) -> None:
        """Draw for those of these images that were not given their noise, each of `shape`, as far as there is room."""
        for item in items:
            if 0 not in item.ahead and self._asked.qsize() < MOST_ASKED:
                self._asked.put((item, shape))

    def close(self) -> None:
        """Stop; what is asked for already may still be drawn."""
        self._asked.put(None)

    def _serve(self) -> None:
        while True:
            asked = [self._asked.get()]
            while not self._asked.empty() and len(asked) < AT_ONCE:
                asked.append(self._asked.get())
            for shape in dict.fromkeys(one[1] for one in asked if one):
                with contextlib.suppress(MemoryError):  # then they draw in their turn
                    draw([one[0] for one in asked if one and one[1] == shape], shape)
            if None in asked:
                return


def draw(items: Sequence[ImageItem], shape: Shape) -> None:
    """The first noise of images that were not given theirs, here and now."""
    items = [item for item in items if 0 not in item.ahead]
    drawn = unit_normals([(item.seed, item.index) for item in items], 0, shape) if items else ()
    for item, noise in zip(items, drawn, strict=True):
        item.ahead[0] = noise

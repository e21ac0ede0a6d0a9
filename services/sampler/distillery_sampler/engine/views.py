"""Views of scenes: cut into tiles, queued a few ahead of who reads them, put together again.

Tiles are what a model's queue holds, so that a large view keeps no small one waiting for longer than a few tiles, and
a view that nobody wants any more ends at its next tile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import NamedTuple

import numpy as np

from distill_core.errors import Overloaded
from distillery_sampler.engine.batcher import Batcher, drop
from distillery_sampler.engine.requests import Region, Rendered, RenderRequest, Tile

TILE_RAYS = 4096
PREVIEW_RAYS = 1024  # of a preview, which is to be seen at once
PREVIEW_FACTOR = 4  # of a preview's pixels, at least


class TileKey(NamedTuple):
    """Batch key of tiles."""

    normals: bool


def regions(width: int, height: int, *, progressive: bool) -> Iterator[Region]:
    """The parts in which a view is rendered: bands of rows, after a preview if it is `progressive`."""
    if progressive:
        factor = PREVIEW_FACTOR
        while -(-width // factor) * -(-height // factor) > PREVIEW_RAYS:
            factor *= 2
        yield Region(range(-(-height // factor)), factor)
    rows = max(1, TILE_RAYS // width)
    for first in range(0, height, rows):
        yield Region(range(first, min(first + rows, height)), last=first + rows >= height)


async def render_views(
    request: RenderRequest, batcher: Batcher, instances: int
) -> AsyncGenerator[Rendered, None]:
    """The views of a request, whole ones, or their regions if it is progressive."""
    window = _Window(batcher, _tiles(request), request, instances + 1)
    parts: list[Rendered] = []
    try:
        while (index := await window.fill()) is not None:
            part = await window.next()
            if request.progressive:
                yield _whole([part], index, part.region)
                continue
            parts.append(part)
            if part.region is not None and part.region.last:
                yield _whole(parts, index)
                parts = []
    finally:
        window.close()


class _Window:
    """The tiles of one request that are queued: the next few."""

    def __init__(
        self, batcher: Batcher, tiles: Iterator[tuple[int, Tile]], request: RenderRequest, size: int
    ) -> None:
        self._batcher, self._tiles, self._size = batcher, tiles, size
        self._key, self._terms = TileKey(request.normals), vars(request.call)
        self._ahead: deque[tuple[int, asyncio.Future[Rendered]]] = deque()
        self._waiting = next(tiles, None)
        self._started = False

    async def fill(self) -> int | None:
        """Queue what there is room for; the index of the next tile's view, None at the end.

        A request once started waits for room, since what was accepted is finished.
        """
        while self._waiting is not None and len(self._ahead) < self._size:
            index, tile = self._waiting
            try:
                (future,) = self._batcher.submit(self._key, [tile], **self._terms)
            except Overloaded as error:
                if self._ahead:
                    break
                if not self._started:
                    raise
                await asyncio.sleep(min(error.retry_after_s, 1.0))
                continue
            self._started = True
            self._ahead.append((index, future))
            self._waiting = next(self._tiles, None)
        return self._ahead[0][0] if self._ahead else None

    async def next(self) -> Rendered:
        """The next tile, when it is rendered."""
        return await self._ahead.popleft()[1]

    def close(self) -> None:
        """Want no more tiles."""
        drop(future for _, future in self._ahead)


def _tiles(request: RenderRequest) -> Iterator[tuple[int, Tile]]:
    for index, view in enumerate(request.views):
        for region in regions(view.width, view.height, progressive=request.progressive):
            yield index, Tile(view, region)


def _whole(parts: list[Rendered], index: int, region: Region | None = None) -> Rendered:
    """Parts of a view, from top to bottom, as one."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    normal = None if parts[0].normal is None else joined("normal")
    return Rendered(index, joined("rgb"), joined("depth"), joined("opacity"), normal, region)

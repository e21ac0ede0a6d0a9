"""The load generator's call of LitServe: its clients are plain HTTP; aiohttp is the lightest of those it names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp

BUSY = (429, 503)


class Refused(Exception):
    """Replaced by the load generator's own."""


async def connect(address: str, model: str) -> Callable[[int, list[int], float], Awaitable[bytes]]:
    """`await call(seed, labels, timeout_s)`: the picture's bytes."""
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        asked = {"seed": seed, "class_label": labels[0]}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with session.post(f"http://{address}/predict", json=asked, timeout=timeout) as reply:
            if reply.status in BUSY:
                raise Refused()
            reply.raise_for_status()
            return await reply.read()

    return call

"""The load generator's call of BentoML, through its own asyncio client; see load.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import bentoml
import numpy as np
from bentoml.exceptions import BentoMLException

BUSY = (429, 503)


class Refused(Exception):
    """Replaced by the load generator's own."""


async def connect(address: str, model: str) -> Callable[[int, list[int], float], Awaitable[bytes]]:
    """`await call(seed, labels, timeout_s)`: the pictures' bytes."""
    client = await bentoml.AsyncHTTPClient(f"http://{address}", timeout=60).__aenter__()

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        asked = np.array([[seed + index, label] for index, label in enumerate(labels)])
        try:
            reply = await asyncio.wait_for(client.generate(asked), timeout_s)
        except BentoMLException as error:
            raise (Refused() if int(error.error_code) in BUSY else error) from None
        return np.asarray(reply, np.uint8).tobytes()

    return call

"""The load generator's call of a KServe v2 server, through tritonclient's asyncio gRPC client; see load.py."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

AT_ONCE = 0.9  # DEADLINE_EXCEEDED before this share of the deadline is the server's refusal, not the clock


class Refused(Exception):
    """Replaced by the load generator's own."""


async def connect(address: str, model: str) -> Callable[[int, list[int], float], Awaitable[bytes]]:
    """`await call(seed, labels, timeout_s)`: the pictures' bytes."""
    client = triton.InferenceServerClient(address)
    name, _, version = model.partition("@")

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        count = len(labels)
        seeds = triton.InferInput("seed", [count, 1], "UINT64")
        seeds.set_data_from_numpy(np.arange(seed, seed + count, dtype=np.uint64)[:, None])
        classes = triton.InferInput("class_label", [count, 1], "INT64")
        classes.set_data_from_numpy(np.array(labels, np.int64)[:, None])
        began = time.perf_counter()
        try:
            result = await client.infer(
                name, [seeds, classes], version, client_timeout=timeout_s, parameters={"num_steps": 1}
            )
        except InferenceServerException as error:
            raise _meaning(error, (time.perf_counter() - began) / timeout_s) from None
        reply = result.get_response()
        return reply.raw_output_contents[0] if reply.raw_output_contents else _typed(reply)

    return call


def _typed(reply: Any) -> bytes:
    """Values that a server sends as protobuf numbers."""
    return bytes(reply.outputs[0].contents.uint_contents)


def _meaning(error: InferenceServerException, share: float) -> Exception:
    status = str(error.status())
    if "RESOURCE_EXHAUSTED" in status or "UNAVAILABLE" in status:
        return Refused()
    if "DEADLINE_EXCEEDED" in status or "CANCELLED" in status:
        return Refused() if share < AT_ONCE else TimeoutError()
    unexpected: Exception = error
    return unexpected

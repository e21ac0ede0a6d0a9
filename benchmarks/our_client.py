"""The load generator's call of our own server, through the client that we ship; see load.py."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from distill_core.errors import Overloaded
from distill_service.status import StatusError
from distillery_sampler.client import AsyncSamplerClient, generate_request

AT_ONCE = 0.9  # before this share of the deadline it is the server that refuses, after it the clock
# the latter where the server's clock was first, or, at once, where it has too many calls in flight
TOO_LATE = ("DEADLINE_EXCEEDED", "CANCELLED")


class Refused(Exception):
    """Replaced by the load generator's own."""


async def connect(address: str, model: str) -> Callable[[int, list[int], float], Awaitable[bytes]]:
    """`await call(seed, labels, timeout_s)`: the pictures' bytes."""
    client = AsyncSamplerClient(address, retries=0)  # a refusal is to be seen

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        request = generate_request(model, class_labels=labels, seed=seed, num_steps=1, image_format="RAW_U8")
        began = time.perf_counter()
        try:
            reply = await client.call_generate(request, timeout_s=timeout_s)
        except Overloaded:
            raise Refused() from None
        except StatusError as error:
            if error.grpc_status not in TOO_LATE:
                raise
            at_once = time.perf_counter() - began < AT_ONCE * timeout_s
            raise (Refused() if at_once else TimeoutError()) from None
        return b"".join(image.data for image in reply.images)

    return call

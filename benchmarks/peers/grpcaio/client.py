"""The load generator's call of gRPC alone."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import grpc


class Refused(Exception):
    """Replaced by the load generator's own."""


async def connect(address: str, model: str) -> Callable[[int, list[int], float], Awaitable[bytes]]:
    """`await call(seed, labels, timeout_s)`: the picture's bytes."""
    call_picture = grpc.aio.insecure_channel(address).unary_unary("/Picture/Make")

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        try:
            reply: bytes = await call_picture(struct.pack("<QQ", seed, labels[0]), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from None
            raise
        return reply

    return call

"""The load generator's call of our own server as programs make it that have no client of ours; see load.py."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import grpc

from distill_service.addresses import grpc_options
from distillery.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc

OPTIONS = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]  # a refusal is to be seen
AT_ONCE = 0.9  # before this share of the deadline it is the server that refuses, after it the clock
# the latter where the server's clock was first, or, at once, where it has too many calls in flight
TOO_LATE = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class Refused(Exception):
    """Replaced by the load generator's own."""


async def connect(address: str, model: str) -> Callable[[int, list[int], float], Awaitable[bytes]]:
    """`await call(seed, labels, timeout_s)`: the pictures' bytes."""
    stub = sampler_pb2_grpc.SamplerServiceStub(
        grpc.aio.insecure_channel(address, [*OPTIONS, *grpc_options(address)])
    )

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        request = sampler_pb2.GenerateRequest(
            model=model,
            class_labels=labels,
            seed=seed,
            num_steps=1,
            image_format=common_pb2.IMAGE_FORMAT_RAW_U8,
        )
        began = time.perf_counter()
        try:
            reply = await stub.Generate(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _meaning(error, (time.perf_counter() - began) / timeout_s) from None
        return b"".join(image.data for image in reply.images)

    return call


def _meaning(error: grpc.aio.AioRpcError, share: float) -> Exception:
    """Error as the load generator takes it, `share` of the deadline after the call was sent."""
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Refused()
    if error.code() in TOO_LATE:
        return Refused() if share < AT_ONCE else TimeoutError()
    unexpected: Exception = error
    return unexpected

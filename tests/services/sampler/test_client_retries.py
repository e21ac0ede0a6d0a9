"""Refused calls are sent again by either client as the server says, so often and so long as was asked for."""

import asyncio
import time

import numpy as np
import pytest

from distill_core.errors import ConfigError, Overloaded
from distill_service.rpc import RpcSettings, bind, build_server
from distill_service.status import StatusError
from distillery.v1 import sampler_pb2, sampler_pb2_grpc
from distillery_sampler.client import AsyncSamplerClient, GenerateOptions, SamplerClient


class Busy(sampler_pb2_grpc.SamplerServiceServicer):
    """Refuses the first calls, and says how soon to try again."""

    def __init__(self, refusals: int, retry_after_s: float) -> None:
        self.refusals, self.retry_after_s, self.calls = refusals, retry_after_s, []

    def _refuse(self) -> None:
        self.calls.append(time.monotonic())
        if len(self.calls) <= self.refusals:
            raise Overloaded("the model is busy", retry_after_s=self.retry_after_s)

    async def Generate(self, request, context):
        self._refuse()
        return sampler_pb2.GenerateResponse()

    async def GenerateStream(self, request, context):
        self._refuse()
        yield sampler_pb2.GenerateStreamResponse(summary=sampler_pb2.GenerateSummary())


async def ask_busy(busy: Busy, *, aio: bool, stream: bool, request_bytes: int = 0, **options) -> None:
    """One call to a server of `busy`."""
    server = build_server(RpcSettings())
    sampler_pb2_grpc.add_SamplerServiceServicer_to_server(busy, server)
    address = f"127.0.0.1:{bind(server, RpcSettings())}"
    await server.start()
    labels: GenerateOptions = {"prompts": ["x" * request_bytes]}

    def ask() -> None:
        with SamplerClient(address, **options) as client:
            list(client.generate_stream("m", **labels)) if stream else client.generate("m", **labels)

    try:
        if not aio:
            await asyncio.to_thread(ask)
        else:
            async with AsyncSamplerClient(address, **options) as client:
                if stream:
                    assert [pair async for pair in client.generate_stream("m", **labels)] == []
                else:
                    await client.generate("m", **labels)
    finally:
        await server.stop(0)


KINDS = pytest.mark.parametrize(
    ("aio", "stream"), [(False, False), (False, True), (True, False), (True, True)]
)


@KINDS
def test_a_refused_call_is_sent_again_when_the_server_said(aio, stream):
    busy = Busy(refusals=2, retry_after_s=0.7)
    asyncio.run(ask_busy(busy, aio=aio, stream=stream))
    waits = np.diff(busy.calls)
    assert len(waits) == 2
    assert (waits >= 0.69).all()  # by itself gRPC would wait at most 0.1 s, then 0.2 s


@KINDS
def test_without_retries_the_first_refusal_is_raised(aio, stream):
    busy = Busy(refusals=1, retry_after_s=0.7)
    with pytest.raises(Overloaded) as error:
        asyncio.run(ask_busy(busy, aio=aio, stream=stream, retries=0))
    assert error.value.retry_after_s == 0.7
    assert len(busy.calls) == 1


def test_so_many_retries_are_made_as_were_asked_for():
    for retries in (1, 4):
        busy = Busy(refusals=9, retry_after_s=0.01)
        with pytest.raises(Overloaded):
            asyncio.run(ask_busy(busy, aio=False, stream=False, retries=retries))
        assert len(busy.calls) == 1 + retries
    for retries in (-1, 5):
        with pytest.raises(ConfigError, match="give 0 to 4"):
            SamplerClient("127.0.0.1:1", retries=retries)


def test_a_large_request_is_sent_again_too():
    busy = Busy(refusals=1, retry_after_s=0.01)
    asyncio.run(ask_busy(busy, aio=False, stream=False, request_bytes=3 * 2**20))
    assert len(busy.calls) == 2


def test_waiting_to_try_again_ends_with_the_deadline():
    busy = Busy(refusals=9, retry_after_s=30.0)
    started = time.monotonic()
    with pytest.raises((StatusError, Overloaded)):
        asyncio.run(ask_busy(busy, aio=True, stream=False, timeout_s=0.5))
    assert time.monotonic() - started < 10
    assert len(busy.calls) == 1

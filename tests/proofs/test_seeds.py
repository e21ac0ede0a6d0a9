"""`make prove-seeds`: what many clients get at once is what each gets alone, also under overload and cancellation.

32 clients, threaded and asyncio ones and tritonclients, ask with seeds of their own. Then more is asked than the queue
holds: refused calls carry a pushback, and clients with the shipped retry policy all get their pictures. Then calls are
cancelled while they wait: by the server's own counter none of their images reaches a batch.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from distill_core.artifacts import ArtifactStore
from distillery.v1 import sampler_pb2_grpc
from distillery_sampler.client import AsyncSamplerClient, SamplerClient, generate_request
from tests.services.sampler.helpers import SamplerProcess, executed, publish_denoiser, teacher_spec
from tests.services.sampler.test_kserve import digits

CLIENTS = 32
SLOW_STEPS = 20_000  # about a second on one core
STEPS = 300  # of a picture under overload: about 15 ms


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("seeds")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    return store.url


def labels_of(number: int) -> list[int]:
    return [(number + offset) % 10 for offset in range(1 + number % 5)]


def ask(address: str, number: int) -> bytes:
    """The pictures of one client; every third one is asyncio's, every third one Triton's."""
    labels, seeds = labels_of(number), [1000 * number + i for i in range(1 + number % 5)]
    if number % 3 == 1:

        async def run() -> list[np.ndarray]:
            async with AsyncSamplerClient(address) as client:
                return await client.generate("digits", class_labels=labels, seeds=seeds, num_steps=4)

        return b"".join(picture.tobytes() for picture in asyncio.run(run()))
    if number % 3 == 2:
        with InferenceServerClient(address) as triton:
            answer = triton.infer("digits", digits(labels, seeds), parameters={"num_steps": 4})
            return answer.as_numpy("images").tobytes()
    with SamplerClient(address) as client:
        pictures = client.generate("digits", class_labels=labels, seeds=seeds, num_steps=4)
        return b"".join(picture.tobytes() for picture in pictures)


def at_once(work, count: int = CLIENTS) -> list:
    """The answers of so many threads that begin together."""
    together = Barrier(count)

    def begin(number: int):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_many_clients_at_once_get_the_bytes_that_each_gets_alone(store_url):
    settings = {"DISTILLERY_SAMPLER_MAX_BATCH": "8", "DISTILLERY_SAMPLER_INSTANCES": "1"}
    with SamplerProcess(store_url, settings) as sampler:
        alone = [ask(sampler.address, number) for number in range(CLIENTS)]
        with InferenceServerClient(sampler.address) as triton:
            before = triton.get_inference_statistics("digits").model_stats[0]
            together = at_once(lambda number: ask(sampler.address, number))
            after = triton.get_inference_statistics("digits").model_stats[0]
        assert together == alone
        assert len(set(alone)) == CLIENTS
        images = after.inference_count - before.inference_count
        assert images == sum(len(labels_of(number)) for number in range(CLIENTS))
        assert after.execution_count - before.execution_count < images  # some did share a batch


def test_overloaded_clients_are_told_when_to_come_back_and_all_finish(store_url):
    settings = {
        "DISTILLERY_SAMPLER_MAX_QUEUE_IMAGES": "8",
        "DISTILLERY_SAMPLER_MAX_BATCH": "1",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        "DISTILLERY_SAMPLER_PRELOAD": '["teacher"]',
    }
    with SamplerProcess(store_url, settings) as sampler:

        def picture(number: int, retries: int) -> tuple[bytes, int]:
            """A picture, or how long to wait for one (ms)."""
            with sampler.client(retries=retries) as client:
                request = generate_request(
                    "teacher", class_labels=[number % 10], seed=number, num_steps=STEPS, image_format="RAW_U8"
                )
                try:
                    return client._sampler.Generate(request, timeout=60).images[0].data, 0
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    return b"", int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])

        alone = [picture(number, 0)[0] for number in range(CLIENTS)]
        refused = [pushback for data, pushback in at_once(lambda number: picture(number, 0)) if not data]
        assert len(refused) > CLIENTS // 4
        assert all(1 <= pushback < 10_000 for pushback in refused)
        answered = [data for data, _ in at_once(lambda number: picture(number, 4))]
        assert answered == alone


def test_cancelled_and_expired_calls_never_reach_a_batch(store_url):
    settings = {"DISTILLERY_SAMPLER_INSTANCES": "1", "DISTILLERY_SAMPLER_PRELOAD": '["teacher"]'}
    with SamplerProcess(store_url, settings) as sampler, grpc.insecure_channel(sampler.address) as channel:
        stub = sampler_pb2_grpc.SamplerServiceStub(channel)
        busy = stub.Generate.future(generate_request("teacher", class_labels=[0], num_steps=SLOW_STEPS))
        time.sleep(0.3)
        request = generate_request("teacher", class_labels=[1, 2])
        cancelled = [stub.Generate.future(request) for _ in range(CLIENTS)]
        expired = [stub.Generate.future(request, timeout=0.2) for _ in range(CLIENTS)]
        time.sleep(0.3)
        assert not busy.done()  # they all waited
        for future in cancelled:
            future.cancel()
        assert {future.code() for future in expired} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        busy.result()
        stub.Generate(generate_request("teacher", class_labels=[3]))
        assert executed(sampler.address, "teacher") == 2  # the one that held the device, and the last

"""The client library, threaded and asyncio, against real sampler processes."""

import asyncio
import gc
import subprocess
import sys
import threading
from contextlib import aclosing

import grpc
import numpy as np
import pytest

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError, NotFound, Overloaded, Unavailable
from distill_service.channels import channel
from distill_service.status import StatusError
from distillery.v1 import common_pb2, sampler_pb2
from distillery_sampler.client import (
    AsyncSamplerClient,
    GenerateOptions,
    SamplerClient,
    generate_request,
    to_pil,
    view_options,
)
from distillery_sampler.client.messages import raw_request
from tests.services.jobs.jobs_stack import wait_for
from tests.services.sampler.helpers import (
    PATIENT_S,
    SLOW_STEPS,
    SamplerProcess,
    executed,
    metered,
    publish_denoiser,
    scraped,
    settled,
    teacher_spec,
    wait_until_busy,
    wait_until_idle,
    wait_until_queued,
)
from tests.services.sampler.test_render import cloud, publish_cloud


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("client")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    publish_cloud(store, root / "cloud", cloud(num_steps=4))
    settings = {"DISTILLERY_SAMPLER_INSTANCES": "1", "DISTILLERY_SAMPLER_MAX_BATCH": "4", **metered()}
    with SamplerProcess(str(root / "store"), settings) as process:
        yield process


@pytest.fixture(scope="module")
def client(sampler):
    with sampler.client() as client:
        yield client


def with_async(sampler: SamplerProcess, work, **options):
    """What `work` answers, given an asynchronous client."""

    async def run():
        async with AsyncSamplerClient(sampler.address, **options) as client:
            return await asyncio.wait_for(work(client), 250)

    return asyncio.run(run())


def test_both_clients_answer_alike(sampler, client):
    view = {"width": 24, "height": 16, "outputs": ("rgb", "depth")}

    async def ask(other: AsyncSamplerClient):
        await other.wait_ready()
        return (
            await other.generate("digits", class_labels=[1, 2], seed=3),
            [pair async for pair in other.generate_stream("digits", class_labels=[1, 2], seed=3)],
            await other.render("cloud", azimuth=10, **view),
            [seen async for seen in other.render_path("cloud", count=2, **view)],
            [seen async for seen in other.render_progressive("cloud", azimuth=10, **view)],
            [model.name for model in await other.models()],
            (await other.model("digits")).version,
            (await other.load("digits")).backend,
        )

    pictures, pairs, seen, path, better, names, version, backend = with_async(sampler, ask)
    whole = client.generate("digits", class_labels=[1, 2], seed=3)
    assert np.array_equal(pictures, whole)
    assert all(np.array_equal(picture, whole[index]) for index, picture in pairs)
    assert len(pairs) == 2
    assert_same(seen, client.render("cloud", azimuth=10, **view))
    assert_same(path[1], list(client.render_path("cloud", count=2, **view))[1])
    assert_same(better[-1], seen)
    assert names == [model.name for model in client.models()]
    assert (version, backend) == (1, "onnxruntime")


def assert_same(one, other) -> None:
    assert np.array_equal(one.rgb, other.rgb)
    assert np.array_equal(one.depth, other.depth)


def test_pictures_become_pil_images_grey_and_coloured(client):
    (digit,) = client.generate("digits", class_labels=[1])
    assert np.array_equal(np.asarray(to_pil(digit)), digit[..., 0])
    view = client.render("cloud", width=8, height=6).rgb
    assert to_pil(view).size == (8, 6)
    assert np.array_equal(np.asarray(to_pil(view)), view)


def test_errors_are_those_of_the_server_in_both(sampler, client):
    async def ask(other: AsyncSamplerClient) -> None:
        with pytest.raises(NotFound, match="did you mean 'digits'"):
            await other.generate("digitz", class_labels=[1])
        with pytest.raises(ConfigError, match="knows 0 to 9") as error:
            async for _ in other.generate_stream("digits", class_labels=[10]):
                pass
        assert error.value.field == "class_labels"

    with_async(sampler, ask)
    with pytest.raises(ConfigError, match="knows 0 to 9"):
        next(client.generate_stream("digits", class_labels=[10]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"promts": ["a"]}, "option 'promts' is not known; did you mean 'prompts'"),
        ({"prompts": "a cat"}, "prompts is one text; give a list"),
        ({"seed": -1}, "seeds are 0 to"),
        ({"class_labels": ["one"]}, "class labels, count and num_steps whole numbers"),
        ({"image_format": "GIF"}, "image_format 'GIF' is not known; known: JPEG, PNG, RAW_U8, WEBP"),
        ({"mask": np.zeros((8, 8), bool)}, "go with an image"),
        ({"image": np.zeros((8, 8))}, "a picture of float64"),
    ],
)
def test_a_request_that_cannot_be_sent_says_why(options, said):
    with pytest.raises(ConfigError, match=said):
        generate_request("digits", **options)


def test_a_view_that_cannot_be_asked_for_says_why():
    with pytest.raises(ConfigError, match="'with' is not known; did you mean 'width'"):
        view_options(**{"with": 3})
    with pytest.raises(ConfigError, match="intrinsics are 4 numbers"):
        view_options(intrinsics=(1.0, 2.0))
    with pytest.raises(ConfigError, match="output 'alpha' is not known"):
        view_options(outputs=("alpha",))
    with pytest.raises(ConfigError, match="not allowed"):
        view_options(width="wide")


def test_every_field_of_a_request_is_an_option():
    fields = {field.name for field in sampler_pb2.GenerateRequest.DESCRIPTOR.fields}
    fields |= {field.name for field in sampler_pb2.ImageInput.DESCRIPTOR.fields}
    assert GenerateOptions.__annotations__.keys() == fields - {"model", "priority"} | {"bulk"}
    assert generate_request("m", bulk=True).priority == sampler_pb2.PRIORITY_BULK
    assert generate_request("m").image_format == common_pb2.IMAGE_FORMAT_PNG
    assert raw_request("m", {}).image_format == common_pb2.IMAGE_FORMAT_RAW_U8  # nothing to pack or to unpack


# -- time: deadlines, cancellation, back-pressure


def test_a_deadline_of_the_client_or_of_one_call_ends_the_call(sampler, client):
    with pytest.raises(StatusError) as error:
        client.generate("teacher", class_labels=[1], num_steps=SLOW_STEPS, timeout_s=0.1)
    assert error.value.grpc_status == "DEADLINE_EXCEEDED"

    async def ask(other: AsyncSamplerClient) -> str:
        with pytest.raises(StatusError) as late:
            await other.generate("teacher", class_labels=[1], num_steps=SLOW_STEPS)
        return late.value.grpc_status

    assert with_async(sampler, ask, timeout_s=0.1) == "DEADLINE_EXCEEDED"


def test_closing_a_stream_early_cancels_the_rest_of_its_pictures(sampler, client):
    wait_until_idle(sampler)
    before = executed(sampler.address, "teacher")
    slow = {"class_labels": [1] * 64, "num_steps": SLOW_STEPS // 60, "timeout_s": PATIENT_S}
    stream = client.generate_stream("teacher", **slow)
    next(stream)
    stream.close()

    async def ask(other: AsyncSamplerClient) -> None:
        async with aclosing(other.generate_stream("teacher", **slow)) as pictures:
            await anext(pictures)

    with_async(sampler, ask)
    wait_until_idle(sampler)
    assert 2 <= executed(sampler.address, "teacher") - before < 64


def test_closing_an_iterator_cancels_its_call_at_once_whoever_else_holds_it(sampler, client, monkeypatch):
    held = []

    def holding(call):
        return lambda *args, **options: held.append(call(*args, **options)) or held[-1]

    monkeypatch.setattr(client._sampler, "RenderPath", holding(client._sampler.RenderPath))
    monkeypatch.setattr(client._models, "WatchModels", holding(client._models.WatchModels))
    for stream in (client.render_path("cloud", count=1000, width=8, height=8), client.watch_models()):
        next(stream)
        stream.close()
        assert held.pop().cancelled()

    async def ask(other: AsyncSamplerClient) -> None:
        other._sampler.RenderPath = holding(other._sampler.RenderPath)
        async with aclosing(other.render_path("cloud", count=1000, width=8, height=8)) as views:
            await anext(views)
        assert held.pop().cancelled()

    with_async(sampler, ask)


def test_cancelling_the_task_cancels_the_call(sampler, client):
    wait_until_idle(sampler)
    before = executed(sampler.address, "teacher")

    async def ask(other: AsyncSamplerClient) -> None:
        slow = {"class_labels": [1], "num_steps": SLOW_STEPS, "timeout_s": PATIENT_S}
        busy = asyncio.create_task(other.generate("teacher", **slow))
        await asyncio.to_thread(wait_until_busy, sampler)
        eight = {"class_labels": [2] * 8, "timeout_s": PATIENT_S}
        waiting = [asyncio.create_task(other.generate("teacher", **eight)) for _ in range(4)]
        await asyncio.to_thread(wait_until_queued, sampler, 32)
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError)
            for end in await asyncio.gather(*waiting, return_exceptions=True)
        )
        await busy

    with_async(sampler, ask)
    assert executed(sampler.address, "teacher") - before == 1


def test_a_path_is_rendered_no_faster_than_either_client_reads_it(sampler, client):
    views, outputs = 400, ("rgb", "depth", "opacity")  # of one tile, and 45 kB each
    size = {"width": 64, "height": 64, "image_format": "RAW_U8", "outputs": outputs}
    client.load("cloud")
    before = settled(sampler, "cloud")
    path = client.render_path("cloud", count=views, **size)
    next(path)
    ahead = settled(sampler, "cloud") - before
    path.close()
    assert 1 <= ahead < views // 2

    async def ask(other: AsyncSamplerClient) -> int:
        start = await asyncio.to_thread(settled, sampler, "cloud")
        async with aclosing(other.render_path("cloud", count=views, **size)) as path:
            await anext(path)
            return await asyncio.to_thread(settled, sampler, "cloud") - start

    assert 1 <= with_async(sampler, ask) < views // 2


def test_a_stream_that_is_dropped_without_closing_leaves_no_call_behind(sampler, client):
    client.load("cloud")
    before, views = executed(sampler.address, "cloud"), 1000
    stream = client.render_path("cloud", count=views, width=64, height=64)
    next(stream)
    del stream
    gc.collect()
    wait_for(lambda: "distillery_inflight 0.0" in scraped(sampler), "the call to end")
    assert executed(sampler.address, "cloud") - before < views


def test_a_client_waits_for_a_sampler_that_is_still_starting(tmp_path):
    """A socket of its own, so that its address is known before it listens."""
    publish_denoiser(ArtifactStore(tmp_path / "store"), tmp_path / "model")
    address = f"unix:{tmp_path / 's.sock'}"
    settings = {"DISTILLERY_SAMPLER_HOST": address, "DISTILLERY_SAMPLER_PRELOAD": '["digits"]'}
    with SamplerClient(address) as client:
        with pytest.raises(Unavailable, match="reported SERVING within 0.2 s"):
            client.wait_ready(0.2)
        ready: list[int] = []

        def wait() -> None:
            client.wait_ready(60)
            ready.append(client.model("digits").state)

        waiting = threading.Thread(target=wait)
        waiting.start()
        with SamplerProcess(str(tmp_path / "store"), settings):
            waiting.join(60)
            assert ready == [3]  # MODEL_STATE_READY: what was preloaded is warm
            assert len(client.generate("digits", class_labels=[1, 2])) == 2

            async def ask() -> int:
                async with AsyncSamplerClient(address) as other:
                    await other.wait_ready(10)
                    return len(await other.generate("digits", class_labels=[1, 2]))

            assert asyncio.run(ask()) == 2


# -- what it needs


def test_the_client_needs_neither_torch_nor_the_server():
    code = (
        "import sys, distillery_sampler.client\n"
        "server = ('torch', 'onnxruntime', 'tritonclient', 'prometheus_client', 'distill_core.artifacts', "
        "'distillery_sampler.engine.engine', 'distillery_sampler.engine.requests', 'distillery_sampler.settings')\n"
        "print([name for name in server if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_channel_closes_with_its_client(sampler):
    with sampler.client() as client:
        client.models()
    with pytest.raises(ValueError, match="closed channel"):
        client.models()
    with channel(sampler.address) as plain:
        assert isinstance(plain, grpc.Channel)


def test_who_is_refused_sends_no_more_than_the_server_takes(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "teacher", name="teacher", sampler=teacher_spec())
    limits = {
        "DISTILLERY_SAMPLER_MAX_QUEUE_IMAGES": "4",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        "DISTILLERY_SAMPLER_MAX_BATCH": "1",
        "DISTILLERY_SAMPLER_PRELOAD": '["teacher"]',
    }

    async def work(client: AsyncSamplerClient) -> None:
        def ask():
            return client.generate(
                "teacher", class_labels=[1], num_steps=SLOW_STEPS // 12, timeout_s=PATIENT_S
            )

        calls = [asyncio.create_task(ask()) for _ in range(8)]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Overloaded, match="4 of 4 images are queued"):
            done.pop().result()
        for _ in range(3):  # refused by the server, until the client knows how many it takes
            with pytest.raises(Overloaded) as error:
                await ask()
        assert f"calls for 'teacher' are in flight, and {client.address} refused more" in str(error.value)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, list) for answer in answers) in (4, 5)
        assert len(await ask()) == 1

    with SamplerProcess(store.url, limits) as process:
        with_async(process, work, retries=0)

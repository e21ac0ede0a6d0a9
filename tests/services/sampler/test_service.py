"""SamplerService and ModelsService of a real process, over loopback."""

import hashlib
import io
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from distill_core.artifacts import ArtifactStore
from distill_core.diffusion.noise import unit_normal
from distill_core.errors import ConfigError, NotFound
from distill_service.status import StatusError
from distillery.v1 import sampler_pb2
from distillery_sampler.client import generate_request
from tests.services.jobs.jobs_stack import wait_for
from tests.services.sampler.helpers import (
    DATA_STD,
    NUM_CLASSES,
    SLOW_STEPS,
    SPREAD2,
    SamplerProcess,
    class_means,
    executed,
    hold,
    metered,
    publish_denoiser,
    scraped,
    teacher_spec,
    wait_until_queued,
    wait_until_shown,
)


@pytest.fixture(scope="module")
def store_url(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampler")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    return str(root / "store")


@pytest.fixture(scope="module")
def sampler(store_url):
    settings = {
        "DISTILLERY_SAMPLER_MAX_BATCH": "8",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        "DISTILLERY_SAMPLER_PRELOAD": '["digits"]',
        **metered(),
    }
    with SamplerProcess(store_url, settings) as process:
        yield process


@pytest.fixture(scope="module")
def client(sampler):
    with sampler.client() as client:
        yield client


def expected(label: int, seed: int, index: int) -> np.ndarray:
    """The one-step student's answer, by the formula."""
    mean = class_means()[label]
    x = 80.0 * unit_normal(seed, index, 0, mean.shape)
    x0 = mean + (x - mean) * SPREAD2 / (SPREAD2 + 80.0**2)
    return np.rint((np.clip(x0, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def test_each_class_label_gets_its_picture(client):
    pictures = client.generate("digits", class_labels=range(NUM_CLASSES), seed=3)
    assert len(pictures) == NUM_CLASSES
    for label, picture in enumerate(pictures):
        np.testing.assert_allclose(picture.astype(int), expected(label, 3, label).astype(int), atol=1)


def test_every_format_holds_the_same_picture(client):
    raw = client.generate("digits", class_labels=[4], seed=1)[0]
    for image_format, signature in (("PNG", b"\x89PNG"), ("WEBP", b"RIFF"), ("JPEG", b"\xff\xd8")):
        request = generate_request("digits", class_labels=[4], seed=1, image_format=image_format)
        data = client.call_generate(request).images[0].data
        assert data.startswith(signature)
        opened = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        tolerance = 16 if image_format == "JPEG" else 0
        np.testing.assert_allclose(opened.astype(int), raw[..., 0].astype(int), atol=tolerance)


def test_an_unsaid_format_is_png_and_the_summary_names_what_answered(client):
    request = sampler_pb2.GenerateRequest(model="digits@latest", class_labels=[0, 1])
    reply = client.call_generate(request)
    assert reply.images[1].data.startswith(b"\x89PNG")
    assert [image.index for image in reply.images] == [0, 1]
    summary = reply.summary
    assert (summary.model, summary.backend, summary.count) == ("digits@1", "onnxruntime", 2)
    assert (summary.num_steps, summary.guidance) == (1, 1.0)


def test_the_float_tensor_is_the_picture_before_rounding(client):
    request = generate_request("digits", class_labels=[5, 6], image_format="RAW_U8", with_tensor=True)
    reply = client.call_generate(request)
    pixels = np.frombuffer(reply.tensor.data, "<f4").reshape(tuple(reply.tensor.shape))
    assert pixels.shape == (2, 1, 8, 8)
    rounded = np.rint((pixels[1] + 1) * 127.5).astype(np.uint8)
    assert rounded.tobytes() == reply.images[1].data


def test_a_stream_sends_the_same_pictures_one_a_message_and_a_summary(sampler, client):
    whole = client.generate("digits", class_labels=range(10), seed=9)
    streamed = dict(client.generate_stream("digits", class_labels=range(10), seed=9))
    assert sorted(streamed) == list(range(10))
    assert all(np.array_equal(streamed[index], whole[index]) for index in range(10))
    request = sampler_pb2.GenerateStreamRequest(request=generate_request("digits", class_labels=[1]))
    events = [reply.WhichOneof("event") for reply in sampler.stub().GenerateStream(request)]
    assert events == ["image", "summary"]


def test_seeds_decide_the_noise_and_position_does_not(client):
    one = client.generate("digits", class_labels=[7, 7, 7], seeds=[11, 12, 11], num_steps=4)
    assert np.array_equal(one[0], one[2])
    assert not np.array_equal(one[0], one[1])
    assert np.array_equal(client.generate("digits", class_labels=[7], seed=12, num_steps=4)[0], one[1])


def test_more_steps_follow_the_students_levels(client):
    pictures = np.stack(client.generate("digits", class_labels=[2] * 64, seed=1, num_steps=4)) / 127.5 - 1
    spread = (pictures - class_means()[2].transpose(1, 2, 0)).std()
    # Re-noised at 0.5 last: the posterior's mean has the variance s2^2 / (s2 + 0.25) left.
    np.testing.assert_allclose(spread, np.sqrt(SPREAD2 * SPREAD2 / (SPREAD2 + DATA_STD**2)), rtol=0.15)


def test_guidance_moves_away_from_the_null_class(client):
    plain, guided = (
        np.stack(client.generate("teacher", class_labels=[1], seed=5, guidance=w))[0].astype(float) / 127.5
        - 1
        for w in (1.0, 0.5)
    )
    mean = class_means()[1].transpose(1, 2, 0)
    assert np.abs(plain - mean).max() < 0.5
    # With w = 0.5 the prediction is halfway to the null class, whose mean is 0.
    assert np.sum(guided * mean) < 0.75 * np.sum(plain * mean)


def test_many_clients_at_once_get_the_bytes_that_each_gets_alone(sampler):
    def ask(seed: int) -> list[bytes]:
        with sampler.client() as own:
            labels = [(seed + offset) % NUM_CLASSES for offset in range(1 + seed % 5)]
            return [p.tobytes() for p in own.generate("digits", class_labels=labels, seed=seed, num_steps=4)]

    alone = [ask(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == alone
    (stats,) = InferenceServerClient(sampler.address).get_inference_statistics("digits").model_stats
    assert stats.execution_count < stats.inference_count  # some did share a batch


BAD_REQUESTS = {
    "class_labels": [
        ({"class_labels": [10]}, "knows 0 to 9"),
        ({"class_labels": [-1]}, "knows 0 to 9"),
        ({}, "class_labels is empty"),
        ({"class_labels": [0] * 257}, "257 images in one request are too many"),
    ],
    "prompts": [({"prompts": ["a seven"]}, "takes no prompts; give class_labels")],
    "num_steps": [
        ({"class_labels": [1], "num_steps": 0}, "num_steps = 0 is not allowed"),
        ({"class_labels": [1], "num_steps": -3}, "1 to 4"),
        ({"class_labels": [1], "num_steps": 5}, "1 to 4"),
    ],
    "seed": [({"class_labels": [1], "seed": 2**63}, "seed 9223372036854775808 is not allowed")],
    "seeds": [({"class_labels": [1], "seeds": [2**64 - 1]}, "give 0 to")],
    "count": [
        ({"class_labels": [1], "count": 2}, "these must be equal"),
        ({"class_labels": [1], "count": -2}, "count = -2 is not allowed"),
    ],
    "guidance": [
        ({"class_labels": [1], "guidance": 1e9}, "-100 to 100"),
        ({"class_labels": [1], "guidance": float("nan")}, "-100 to 100"),
    ],
}


@pytest.mark.parametrize(
    ("field", "options", "said"),
    [(field, options, said) for field, cases in BAD_REQUESTS.items() for options, said in cases],
)
def test_a_bad_request_names_its_field(client, field, options, said):
    with pytest.raises(ConfigError, match=said) as error:
        client.generate("digits", **options)
    assert error.value.field == field


def test_an_unknown_model_version_or_alias_names_what_there_is(client):
    with pytest.raises(NotFound, match="did you mean 'digits'"):
        client.generate("digit", class_labels=[1])
    with pytest.raises(NotFound, match="has no version 7; it has 1"):
        client.generate("digits@7", class_labels=[1])
    with pytest.raises(NotFound, match="no alias 'prod'"):
        client.generate("digits@prod", class_labels=[1])
    with pytest.raises(ConfigError, match="not a plain name"):
        client.generate("../digits", class_labels=[1])


def test_an_unknown_format_or_priority_is_refused(sampler):
    request = sampler_pb2.GenerateRequest(model="digits", class_labels=[1], image_format=77)
    with pytest.raises(grpc.RpcError, match="image_format 77 is not known"):
        sampler.stub().Generate(request)
    request = sampler_pb2.GenerateRequest(model="digits", class_labels=[1], priority=9)
    with pytest.raises(grpc.RpcError, match="priority 9 is not known"):
        sampler.stub().Generate(request)


def test_a_request_larger_than_a_message_is_refused_by_both_sides(sampler):
    request = sampler_pb2.GenerateRequest(model="digits", prompts=["x" * (65 * 2**20)])
    with pytest.raises(grpc.RpcError) as error:
        sampler.stub().Generate(request)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_reply_too_large_for_one_message_points_at_the_stream(store_url):
    with (
        SamplerProcess(store_url, {"DISTILLERY_SAMPLER_MAX_REPLY_BYTES": "1024"}) as small,
        small.client() as client,
    ):
        with pytest.raises(ConfigError, match="use GenerateStream"):
            client.generate("digits", class_labels=[0] * 17)
        assert len(dict(client.generate_stream("digits", class_labels=[0] * 17))) == 17


def test_cancelled_and_expired_calls_never_reach_a_batch(sampler, client):
    client.generate("teacher", class_labels=[0])
    before = executed(sampler.address, "teacher")
    busy = hold(sampler)
    stub = sampler.stub()
    request = generate_request("teacher", class_labels=[1, 2])
    cancelled = [stub.Generate.future(request) for _ in range(3)]
    expired = [stub.Generate.future(request, timeout=0.1) for _ in range(3)]
    assert {future.code() for future in expired} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    wait_until_queued(sampler, 6)
    for future in cancelled:
        future.cancel()
    wait_until_queued(sampler, 0)
    assert not busy.done()
    busy.result()
    client.generate("teacher", class_labels=[3])
    assert executed(sampler.address, "teacher") - before == 2  # the one that held the device, and the last


def test_what_cannot_be_done_in_time_is_refused_before_it_is_sent(store_url):
    settings = {
        "DISTILLERY_SAMPLER_PRELOAD": '["teacher"]',
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        **metered(),
    }
    with SamplerProcess(store_url, settings) as sampler, grpc.insecure_channel(sampler.address) as plain:
        busy, unsent = hold(sampler), threading.Event()
        slow = generate_request("teacher", class_labels=[1] * 8, num_steps=SLOW_STEPS)
        waiting = sampler.stub().Generate.future(slow)
        wait_until_queued(sampler, 8)
        call = plain.stream_unary("/distillery.v1.SamplerService/Generate")
        with pytest.raises(grpc.RpcError) as error:
            call(iter(lambda: unsent.wait(60) and b"", None), timeout=2)
        unsent.set()
        waiting.cancel()
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the queue takes about" in error.value.details()
        busy.result()


def test_overload_is_refused_with_a_pushback_that_the_shipped_client_obeys(store_url):
    limits = {
        "DISTILLERY_SAMPLER_MAX_QUEUE_IMAGES": "8",
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        "DISTILLERY_SAMPLER_PRELOAD": '["teacher"]',
        **metered(),
    }
    with SamplerProcess(store_url, limits) as sampler:
        busy = hold(sampler)
        stub = sampler.stub()
        waiting = [stub.Generate.future(generate_request("teacher", class_labels=[1] * 4)) for _ in range(2)]
        wait_until_queued(sampler, 8)
        with pytest.raises(grpc.RpcError) as error:
            stub.Generate(generate_request("teacher", class_labels=[1]))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "8 of 8 images are queued" in error.value.details()
        pushback = dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]
        assert int(pushback) >= 1
        with sampler.client() as client, ThreadPoolExecutor(1) as pool:  # its channel retries
            answer = pool.submit(client.generate, "teacher", class_labels=[1])
            wait_until_shown(sampler, "rejected_total", 2, reason="queue")
            assert not answer.done()
            for future in waiting:  # and the queue is free, however long the device is held
                future.cancel()
            assert len(answer.result()) == 1
        assert len(busy.result().images) == 1


def test_health_serves_and_a_told_process_ends_its_calls_first(store_url):
    settings = {
        "DISTILLERY_SAMPLER_PRELOAD": '["teacher"]',
        "DISTILLERY_SAMPLER_INSTANCES": "1",
        **metered(),
    }
    with SamplerProcess(store_url, settings) as sampler:
        with grpc.insecure_channel(sampler.address) as plain:
            stub = health_pb2_grpc.HealthStub(plain)
            for service in ("", "distillery.v1.SamplerService", "inference.GRPCInferenceService"):
                status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
                assert status == health_pb2.HealthCheckResponse.SERVING
        busy = hold(sampler)
        assert sampler.stop() == 0
        assert len(busy.result().images) == 1


def run_server(store_url: str, **environment: str) -> subprocess.CompletedProcess:
    process = SamplerProcess(store_url, environment)
    command, variables = process.command()
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_a_port_in_use_and_a_missing_model_end_the_process_with_one_sentence(sampler, store_url):
    taken = run_server(store_url, DISTILLERY_SAMPLER_PORT=str(sampler.port))
    assert taken.returncode == 2
    assert "port is in use" in taken.stderr
    missing = run_server(store_url, DISTILLERY_SAMPLER_PRELOAD='["digitz"]')
    assert missing.returncode == 67
    assert "did you mean 'digits'" in missing.stderr
    wrong = run_server(store_url, DISTILLERY_SAMPLER_MAX_BATCH="0")
    assert wrong.returncode == 2
    assert "DISTILLERY_SAMPLER_MAX_BATCH" in wrong.stderr
    assert "Traceback" not in taken.stderr + missing.stderr + wrong.stderr


def test_prometheus_sees_requests_batches_and_models(store_url):
    with SamplerProcess(store_url, metered()) as sampler:
        with sampler.client() as client:
            client.generate("digits", class_labels=[1, 2, 3])
            with pytest.raises(ConfigError):
                client.generate("digits", class_labels=[99])
        method = 'method="distillery.v1.SamplerService.Generate"'
        refused = f'distillery_requests_total{{code="INVALID_ARGUMENT",{method}}} 1.0'
        deadline, text = time.monotonic() + 20, ""
        while (
            refused not in text and time.monotonic() < deadline
        ):  # a call is counted after its answer is sent
            text = scraped(sampler)
    assert refused in text
    assert f'distillery_requests_total{{code="OK",{method}}} 1.0' in text
    labels = 'backend="onnxruntime",model="digits",version="1"'
    assert f"distillery_batch_images_sum{{{labels}}} 3.0" in text
    assert 'distillery_model_reload_total{model="digits",result="loaded"} 1.0' in text
    assert "distillery_model_info{" in text
    assert "distillery_encode_seconds_count" in text


def test_a_token_and_tls_are_asked_for_when_configured(store_url, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate to test with")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    secret = hashlib.sha256(b"open sesame").hexdigest()
    (tmp_path / "tokens").write_text(f"app:{secret}:use\n")
    settings = {
        "DISTILLERY_TLS_CERT": str(tmp_path / "cert.pem"),
        "DISTILLERY_TLS_KEY": str(tmp_path / "key.pem"),
        "DISTILLERY_TOKENS_FILE": str(tmp_path / "tokens"),
    }
    with SamplerProcess(store_url, settings) as sampler:
        ca = tmp_path / "cert.pem"
        with sampler.client(ca=ca, token="open sesame") as client:
            assert len(client.generate("digits", class_labels=[1])) == 1
            assert len(dict(client.generate_stream("digits", class_labels=[1, 2]))) == 2
            with pytest.raises(StatusError, match="scope admin"):
                client.unload("digits")
        triton = InferenceServerClient(sampler.address, ssl=True, root_certificates=str(ca))
        assert triton.get_server_metadata({"authorization": "Bearer open sesame"}).name == "distillery"
        with pytest.raises(InferenceServerException, match="header 'authorization: Bearer TOKEN'"):
            triton.get_server_metadata()
        with pytest.raises(InferenceServerException, match="bearer token is needed"):
            triton.get_server_metadata({"authorization": "open sesame"})
        with sampler.client(ca=ca, token="guess") as client, pytest.raises(StatusError, match="not known"):
            client.generate("digits", class_labels=[1])


def test_an_onnx_model_is_served_without_torch(store_url, tmp_path):
    code = f"""
import asyncio, sys
from pathlib import Path
import distillery_sampler.server
from distill_core.artifacts import ArtifactStore
from distillery_sampler.engine.engine import Engine
from distillery_sampler.metrics import Metrics
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.settings import SamplerSettings

async def run():
    engine = Engine(ArtifactStore({store_url!r}), Path({str(tmp_path)!r}), SamplerSettings(), Metrics())
    pictures, summary = await engine.generate(GenerateRequest("digits", class_labels=(1, 2)))
    assert len(pictures) == 2 and summary.backend == "onnxruntime"
    await engine.close()

asyncio.run(run())
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_models_service_lists_loads_and_unloads(sampler, client):
    listed = {model.name: model for model in client.models()}
    assert set(listed) == {"digits", "teacher"}
    generator = listed["digits"].generator
    assert (generator.condition, generator.num_classes, generator.max_steps) == ("class_label", 10, 4)
    watched: list[tuple[str, int]] = []
    seen = threading.Event()

    def watch() -> None:
        with sampler.client() as own:
            for model in own.watch_models():
                watched.append((model.name, model.state))
                if ("digits", 1) in watched and watched[-1] == ("digits", 3):
                    seen.set()
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    wait_for(lambda: ("digits", 3) in watched, "the watcher to see the model")
    client.unload("digits")
    assert client.model("digits").backend == ""
    with pytest.raises(NotFound, match="is not loaded"):
        client.unload("digits")
    wait_for(lambda: len(watched) >= 3, "the watcher to see it go")
    assert client.load("digits").backend == "onnxruntime"
    assert seen.wait(), watched

"""Every size that a caller names has a limit, of one status, in both protocols."""

import re

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from distill_core.artifacts import ArtifactStore, CondSpec, ImageSpec, SamplerSpec
from distill_core.errors import ConfigError
from distill_core.kinds.denoiser.card import Card
from distill_service.rpc import MAX_RECEIVE_BYTES
from distillery.v1 import sampler_pb2, sampler_pb2_grpc
from distillery_sampler.client import generate_request
from distillery_sampler.engine.checks import image_items
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.settings import SamplerSettings
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.sampler.test_kserve import digits, tensors
from tests.services.sampler.test_render import cloud, publish_cloud

LIMITS = {
    "MAX_IMAGES": "8",
    "MAX_QUEUE_IMAGES": "6",
    "MAX_PROMPT_CHARS": "20",
    "MAX_SIDE": "64",
    "MAX_PIXELS": "2048",
    "MAX_VIEWS": "4",
    "MAX_REPLY_BYTES": "16384",
}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("limits")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_cloud(store, root / "cloud", cloud(num_steps=4))
    settings = {f"DISTILLERY_SAMPLER_{name}": value for name, value in LIMITS.items()}
    with SamplerProcess(str(root / "store"), settings) as process:
        yield process


@pytest.fixture(scope="module")
def client(sampler):
    with sampler.client() as client:
        yield client


@pytest.fixture(scope="module")
def triton(sampler):
    with InferenceServerClient(sampler.address) as client:
        yield client


@pytest.mark.parametrize(
    ("count", "said"),
    [(9, "9 images in one request are too many; allowed are 8"), (7, "more than the queue of 6")],
)
def test_the_images_of_a_request(client, triton, count, said):
    with pytest.raises(ConfigError, match=said):
        client.generate("digits", class_labels=[1] * count)
    with pytest.raises(ConfigError, match=said):
        list(client.generate_stream("digits", class_labels=[1] * count))
    with pytest.raises(InferenceServerException, match=said) as error:
        triton.infer("digits", digits([1] * count, [1] * count))
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert len(client.generate("digits", class_labels=[1] * 6)) == 6


def posed(width: int, height: int, views: int = 1):
    pinhole = np.tile(np.array([20, 20, width / 2, height / 2], np.float32), (views, 1))
    return tensors(pose=np.tile(np.eye(4, dtype=np.float32), (views, 1, 1)), intrinsics=pinhole)


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (65, 1, "width = 65 is not allowed: give 1 to 64 pixels"),
        (1, 65, "height = 65 is not allowed: give 1 to 64 pixels"),
        (64, 33, "a view of 64 x 33 is too large; allowed are 2048 pixels"),
    ],
)
def test_the_pixels_of_a_view(client, triton, width, height, said):
    size = {"width": width, "height": height}
    for ask in (
        lambda: client.render("cloud", **size),
        lambda: list(client.render_path("cloud", count=2, **size)),
        lambda: list(client.render_progressive("cloud", **size)),
    ):
        with pytest.raises(ConfigError, match=said):
            ask()
    with pytest.raises(InferenceServerException, match=said) as error:
        triton.infer("cloud", posed(width, height))
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_views_of_a_path(client, triton):
    with pytest.raises(ConfigError, match="a path of 5 views is not allowed: ask for 1 to 4"):
        list(client.render_path("cloud", count=5, width=8, height=8))
    with pytest.raises(ConfigError, match="a path of 5 views is not allowed"):
        list(client.render_path("cloud", poses=[np.eye(4)] * 5, width=8, height=8))
    with pytest.raises(InferenceServerException, match="5 views in one request are too many; allowed are 4"):
        triton.infer("cloud", posed(8, 8, views=5))


def test_the_bytes_of_a_reply(client, triton):
    with pytest.raises(ConfigError, match="one message holds 0 MiB; use several smaller views"):
        client.render("cloud", width=64, height=32, outputs=("rgb", "depth", "opacity", "normal"))
    with pytest.raises(InferenceServerException, match="use smaller batches"):
        triton.infer("cloud", posed(64, 32, views=2))
    client.render("cloud", width=64, height=32, outputs=("rgb", "depth"))


def test_the_characters_of_a_prompt_and_of_a_negative_one():
    card = Card(
        image=ImageSpec(channels=4, height=8, width=8, picture=(3, 16, 16)),
        cond=CondSpec(kind="prompt", max_tokens=8, embed_dim=8),
        sampler=SamplerSpec(kind="few_step", sigmas=(10.0,), noise_scale=10.0, num_steps=1, max_steps=1),
    )
    limits = SamplerSettings(max_prompt_chars=20)
    with pytest.raises(ConfigError, match="a prompt of 21 characters is too long; allowed are 20") as error:
        image_items(GenerateRequest("prompted", prompts=("x" * 21,)), card, limits, "prompted@1")
    assert error.value.field == "prompts"
    request = GenerateRequest("prompted", prompts=("x" * 20,), negative_prompts=("x" * 21,))
    with pytest.raises(ConfigError, match="a negative prompt of 21 characters") as error:
        image_items(request, card, limits, "prompted@1")
    assert error.value.field == "negative_prompts"


def test_the_bytes_of_a_request(sampler, client):
    """More than the server takes is refused before it is read; as much as it takes reaches its checks."""
    with grpc.insecure_channel(sampler.address, [("grpc.max_send_message_length", -1)]) as plain:
        stub = sampler_pb2_grpc.SamplerServiceStub(plain)
        request = sampler_pb2.GenerateRequest(model="digits", prompts=["x" * MAX_RECEIVE_BYTES])
        with pytest.raises(grpc.RpcError) as error:
            stub.Generate(request, timeout=240)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        request = sampler_pb2.GenerateRequest(model="digits", prompts=["x" * (MAX_RECEIVE_BYTES - 100)])
        with pytest.raises(grpc.RpcError, match="takes no prompts"):
            stub.Generate(request, timeout=240)
    assert len(client.generate("digits", class_labels=[1])) == 1


def test_a_picture_is_measured_before_it_is_unpacked(client):
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    with pytest.raises(ConfigError, match="not a readable picture|60000 x 60000 pixels"):
        client.generate("digits", class_labels=[1], image=bomb + b"\0" * 64)
    with pytest.raises(ConfigError, match="image.image is 9 x 8 pixels, and digits@1 makes 8 x 8"):
        client.generate("digits", class_labels=[1], image=np.zeros((8, 9), np.uint8))


def test_a_models_name_and_a_seed(sampler, client):
    for letter in ("x", "\u732b"):  # what is said of them fits into an answer's headers
        with pytest.raises(
            ConfigError, match=r"(?s)model 'x+….*1 to 64 characters".replace("x", letter)
        ) as error:
            client.generate(letter * 100_000, class_labels=[1])
        assert len(str(error.value).encode()) <= 1000
    with pytest.raises(ConfigError, match="give 0 to 9223372036854775807"):
        client.call_generate(generate_request("digits", class_labels=[1], seed=2**63))
    long = service_pb2.ModelInferRequest(model_name="digits")
    long.inputs.add(name="x" * 100_000, datatype="UINT64", shape=[1, 1])
    with grpc.insecure_channel(sampler.address) as plain:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(plain)
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(long)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().endswith("is not known; known: seed, latents, class_label, guidance_scale")


def test_every_limit_of_the_settings_is_held_by_a_test():
    sizes = re.compile("max_(images|queue_images|prompt_chars|side|pixels|views|reply_bytes)")
    named = {name for name in SamplerSettings.model_fields if sizes.fullmatch(name)}
    assert named == {name.lower() for name in LIMITS}

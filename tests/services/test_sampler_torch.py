"""The torch backend, text-to-image, and scenes: the engine in this process, with the library's own models."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.config import NetworkConfig
from distill_core.errors import ConfigError
from distill_core.networks.diffusers_io import DiffusersDenoiser, build_denoiser, load_denoiser
from distill_core.networks.generation import generate
from distillery_sampler.engine import Engine
from distillery_sampler.metrics import Metrics
from distillery_sampler.requests import GenerateRequest
from distillery_sampler.settings import SamplerSettings
from tests.helpers import tiny_text_to_image


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("torch") / "store")


@pytest.fixture(scope="module")
def denoiser(store, tmp_path_factory) -> DiffusersDenoiser:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 8,
    }
    denoiser = build_denoiser(
        NetworkConfig(name="UNet2DModel", args=args),
        parameterisation="edm",
        shape=(1, 8, 8),
        num_classes=10,
        num_steps=4,
    )
    folder = tmp_path_factory.mktemp("unet") / "model"
    denoiser.save(folder)
    store.publish(folder, Manifest(name="unet", **denoiser.manifest_fields()))
    return load_denoiser(folder)


@pytest.fixture(scope="module")
def prompted(store, tmp_path_factory) -> DiffusersDenoiser:
    folder = tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")
    denoiser = load_denoiser(folder)
    store.publish(folder, Manifest(name="prompted", **denoiser.manifest_fields()))
    return denoiser


def answer(
    store: ArtifactStore, tmp_path: Path, *requests: GenerateRequest, **settings: object
) -> list[np.ndarray]:
    """The pictures of requests that are sent together, (B, C, H, W) each."""

    async def run() -> list[np.ndarray]:
        values = {"instances": 1, "max_batch": 8, **settings}
        engine = Engine(store, tmp_path, SamplerSettings(**values), Metrics())
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        await engine.close()
        return [np.stack([picture.pixels for picture in pictures]) for pictures, _ in answers]

    return asyncio.run(run())


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_server_samples_as_the_library_does(store, denoiser, tmp_path, guidance):
    labels = (3, 1, 4)
    (served,) = answer(
        store, tmp_path, GenerateRequest("unet", class_labels=labels, seed=7, guidance=guidance)
    )
    made = generate(denoiser, {"class_label": torch.tensor(labels)}, 3, seed=7, guidance=guidance)
    np.testing.assert_allclose(served, made.numpy(), atol=1e-4)


def test_neighbours_in_a_batch_do_not_change_a_picture(store, denoiser, tmp_path):
    wanted = GenerateRequest("unet", class_labels=(5,), seed=1)
    others = [GenerateRequest("unet", class_labels=(k, k + 1), seed=k) for k in range(4)]
    (alone,) = answer(store, tmp_path, wanted)
    together = answer(store, tmp_path, *others[:2], wanted, *others[2:])[2]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_prompts_are_drawn_as_the_library_draws_them(store, prompted, tmp_path):
    request = GenerateRequest("prompted", prompts=("abc", "xyz"), seed=2, num_steps=2, guidance=3.0)
    (served,) = answer(store, tmp_path, request)
    assert served.shape == (2, 3, 16, 16)
    made = generate(prompted, prompted.encode_prompts(["abc", "xyz"]), 2, seed=2, num_steps=2, guidance=3.0)
    np.testing.assert_allclose(served, made.numpy(), atol=1e-4)
    assert np.abs(served[0] - served[1]).max() > 1e-3


def test_a_converted_text_model_answers_the_same_without_its_torch_weights(store, prompted, tmp_path):
    from distillery_converter.convert import convert

    converted = convert(store, "prompted@1", "onnx-fp32")
    options = {
        "prompts": ("abc", "", "a much longer prompt than the eight tokens"),
        "seed": 2,
        "num_steps": 2,
    }
    onnx, plain = answer(
        store,
        tmp_path,
        GenerateRequest(converted.ref, guidance=3.0, **options),
        GenerateRequest("prompted@1", guidance=3.0, **options),
    )
    np.testing.assert_allclose(onnx, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (GenerateRequest("prompted@1"), "prompts is empty"),
        (GenerateRequest("prompted@1", prompts=("x" * 2001,)), "2001 characters is too long"),
        (GenerateRequest("prompted@1", class_labels=(1,)), "takes no class_labels; give prompts"),
    ],
)
def test_a_bad_prompt_is_refused(store, prompted, tmp_path, request_, said):
    with pytest.raises(ConfigError, match=said):
        answer(store, tmp_path, request_)

"""Models that enlarge: the request's picture is their condition, by torch and by an export."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from tritonclient.grpc import service_pb2

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.diffusion.super_resolution import LOW_RESOLUTION
from distill_core.errors import ConfigError
from distill_core.kinds.base import image_probe_of
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.recipe.tables import NetworkConfig
from distillery_converter.convert import convert
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.image_formats import encode, to_uint8
from distillery_sampler.engine.requests import Call, GenerateRequest, ImageInput
from distillery_sampler.kserve.servicer import KserveServicer
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.services.sampler.helpers import answer

NETWORK = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    denoiser = build_denoiser(
        NetworkConfig(name="UNet2DModel", args=NETWORK),
        parameterisation="v",
        shape=(3, 16, 8),
        num_classes=None,
        low_resolution=4,
    )
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser))
    for value in denoiser.parameters():
        torch.nn.init.normal_(value, std=0.3)
    folder = tmp_path_factory.mktemp("enlarging") / "model"
    denoiser.save(folder)
    return folder


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    denoiser = load_denoiser(folder)
    store.publish(folder, Manifest(name="large", **described(denoiser), parity=image_probe_of(denoiser)))
    convert(store, "large@1", "onnx-fp32")
    return store


def picture(height=4, width=2, seed=0):
    """A picture (C, h, w) in [-1, 1] of whole bytes, and its PNG."""
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width)).astype(np.float32) / 127.5 - 1
    return values, encode(to_uint8(values), "PNG")


def wish(ref="large@1", **image):
    return GenerateRequest(ref, seed=5, count=2, image=ImageInput(**image))


def test_the_picture_of_a_request_is_enlarged_by_torch_and_by_an_export_alike(store, folder, tmp_path):
    small, png = picture()
    other, png_of_other = picture(seed=1)
    requests = [wish(ref, image=data) for ref in ("large@1", "large@2") for data in (png, png_of_other)]
    by_torch, another, by_onnx, another_by_onnx = answer(store, tmp_path, *requests)
    for served, given in ((by_torch, small), (another, other)):
        cond = {LOW_RESOLUTION: torch.from_numpy(given)[None].expand(2, -1, -1, -1)}
        wanted = generate(load_denoiser(folder), cond, 2, seed=5)
        np.testing.assert_allclose(served, wanted, atol=1e-5)
    np.testing.assert_allclose(by_onnx, by_torch, atol=1e-3)
    np.testing.assert_allclose(another_by_onnx, another, atol=1e-3)
    assert np.abs(by_torch - another).mean() > 0.01
    assert np.abs(by_torch[0] - by_torch[1]).mean() > 0.01


@pytest.mark.parametrize(
    ("image", "field", "said"),
    [
        ({"image": picture(8, 4)[1]}, "image.image", "4 x 8 pixels, and large@1 enlarges 2 x 4 to 8 x 16"),
        ({"image": picture(3, 2)[1]}, "image.image", "2 x 3 pixels"),
        ({"image": b"no picture"}, "image.image", "image.image"),
        ({"image": picture()[1], "strength": 0.3}, "image.strength", "leave image.strength out"),
        ({"image": picture()[1], "mask": picture()[1]}, "image.mask", "leave image.mask out"),
        ({"image": picture()[1], "upscale": True}, "image.upscale", "leave image.upscale out"),
    ],
)
def test_a_picture_that_cannot_be_enlarged_is_refused_by_its_field(store, tmp_path, image, field, said):
    with pytest.raises(ConfigError, match=said) as refused:
        answer(store, tmp_path, wish(**image))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("request_", "field", "said"),
    [
        (GenerateRequest("large@1"), "image", "needs a small picture, which it enlarges 4 times"),
        (GenerateRequest("large@1", class_labels=(1,)), "class_labels", "takes no class_labels; give image"),
        (
            GenerateRequest("large@1", guidance=2.0, image=ImageInput(picture()[1])),
            "guidance",
            "guidance",
        ),
    ],
)
def test_a_request_without_its_picture_or_with_what_it_does_not_take_is_refused(
    store, tmp_path, request_, field, said
):
    with pytest.raises(ConfigError, match=said) as refused:
        answer(store, tmp_path, request_)
    assert refused.value.field == field


def infer(store, cache, small: np.ndarray) -> service_pb2.ModelInferResponse:
    """What KServe v2 answers to pictures uint8 (B, h, w, C)."""
    request = service_pb2.ModelInferRequest(model_name="large", model_version="1")
    for name, datatype, values in (
        ("low_resolution", "UINT8", small),
        ("seed", "UINT64", np.array([[5], [7]], np.uint64)),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())

    async def run() -> service_pb2.ModelInferResponse:
        engine = Engine(store, cache, SamplerSettings(instances=1, max_batch=8), Metrics())
        try:
            return await KserveServicer(engine, lambda: True)._infer(request, Call())
        finally:
            await engine.close()

    return asyncio.run(run())


def test_kserve_takes_a_picture_for_each_image_as_a_tensor(store, folder, tmp_path):
    pictures = np.stack([picture(seed=seed)[0] for seed in (0, 1)])
    reply = infer(store, tmp_path, np.stack([to_uint8(one) for one in pictures]))
    shown = np.frombuffer(reply.raw_output_contents[0], np.uint8).reshape(tuple(reply.outputs[0].shape))
    for row, seed in enumerate((5, 7)):
        cond = {LOW_RESOLUTION: torch.from_numpy(pictures[row])[None]}
        wanted = to_uint8(generate(load_denoiser(folder), cond, 1, seed=seed)[0].numpy())
        assert np.abs(shown[row].astype(int) - wanted).max() <= 1
    with pytest.raises(ConfigError, match=r"wanted is UINT8 \[-1, 4, 2, 3\]") as refused:
        infer(store, tmp_path, np.zeros((2, 5, 2, 3), np.uint8))
    assert refused.value.field == "inputs.low_resolution"

"""The image probe of a manifest: what it notices, what it forgives, and that what is published has one."""

import numpy as np
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ConfigError
from distill_core.kinds.base import image_probe_of
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.probe import ImageProbe
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import tiny_text_to_image

ARGS = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 8,
}


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, 20, 36)).astype(np.float32)


def unet(seed: int = 0):
    torch.manual_seed(seed)
    network = NetworkConfig(name="UNet2DModel", args=ARGS)
    return build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)


def test_the_same_picture_does_not_differ_and_rounding_hardly():
    sample = ImageProbe.of(picture())
    assert sample.shape == (3, 8, 8)
    assert sample.difference(picture()) < 1e-6
    assert sample.difference(picture() + 1e-3) < 2e-3


def test_one_wrong_corner_and_a_lost_texture_are_seen():
    sample = ImageProbe.of(picture())
    wrong = picture()
    wrong[:, :4, :4] = -wrong[:, :4, :4]
    assert sample.difference(wrong) > 0.05
    flat = picture()
    for rows in np.array_split(flat, 8, axis=1):  # the same means without their texture
        for cell in np.array_split(rows, 8, axis=2):
            cell[...] = cell.mean((1, 2), keepdims=True)
    assert np.abs(np.array(ImageProbe.of(flat).means) - sample.means).max() < 1e-5
    assert sample.difference(flat) > 0.3


def test_a_picture_of_another_size_differs_without_bound_and_lists_must_fit():
    assert ImageProbe.of(picture()).difference(picture()[:, :4]) == float("inf")
    with pytest.raises(ConfigError, match="needs as many means"):
        ImageProbe.parse({"shape": (1, 2, 2), "means": (0.0,) * 4, "spreads": (0.0,) * 3})


def test_a_sample_tells_two_models_apart_and_travels_through_a_manifest(tmp_path):
    one, other = unet(0), unet(1)
    sample = image_probe_of(one)
    assert sample is not None
    assert (sample.class_label, sample.num_steps) == (0, 1)
    assert sample == image_probe_of(one)
    store = ArtifactStore(tmp_path / "store")
    one.save(tmp_path / "model")
    store.publish(tmp_path / "model", Manifest(name="m", parity=sample, **described(one)))
    read = store.manifest("m").parity
    assert read == sample
    again = image_probe_of(load_denoiser(store.fetch("m")))
    assert np.abs(np.subtract(again.means, sample.means)).max() < 1e-4
    assert np.abs(np.subtract(image_probe_of(other).means, sample.means)).max() > 0.05


def test_a_text_model_is_asked_for_a_prompt_and_without_an_encoder_for_nothing(tmp_path):
    denoiser = load_denoiser(tiny_text_to_image(tmp_path / "pipeline"))
    sample = image_probe_of(denoiser)
    assert sample is not None
    assert sample.prompt == next(iter(denoiser.cond.examples), "")
    assert image_probe_of(denoiser.bare()) is None

"""An adapter of a text-to-image model, converted: its factors are in the graph, and its base stays where it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError
from distill_core.kinds.cards import described, generator_card
from distill_core.kinds.loading import load_artifact
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.generation import generate
from distill_core.recipe.tables import LoraConfig
from distillery_converter.convert import convert
from distillery_sampler.engine.engine import Engine
from distillery_sampler.engine.requests import GenerateRequest
from distillery_sampler.metrics import Metrics
from distillery_sampler.settings import SamplerSettings
from tests.helpers import tiny_text_to_image

PROMPTS = ("a cat", "dogs")
REQUEST = {"prompts": PROMPTS, "seed": 2, "num_steps": 2, "guidance": 3.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    """A text-to-image model, and an adapter over it without its weights."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapter")
    store = ArtifactStore(root / "store")
    base = load_denoiser(tiny_text_to_image(root / "base"))
    store.publish(root / "base", Manifest(name="base", **described(base)))
    lora = LoraDenoiser(
        load_artifact(store, "base", root), LoraConfig(rank=2, alpha=4.0, targets="all-linear")
    )
    with torch.no_grad():
        for value in lora.parameters():
            value.normal_(std=0.2)
    lora.form = "adapter"
    lora.save(root / "style")
    store.publish(root / "style", Manifest(name="style", **described(lora)))
    return store


def served(store: ArtifactStore, ref: str, backend: str, tmp_path: Path) -> np.ndarray:
    async def run() -> np.ndarray:
        settings = SamplerSettings(instances=1, max_batch=2, backend=backend)
        engine = Engine(store, tmp_path, settings, Metrics())
        pictures, _ = await engine.generate(GenerateRequest(ref, **REQUEST))
        await engine.close()
        return np.stack([picture.pixels for picture in pictures])

    return asyncio.run(run())


def test_a_converted_adapter_draws_what_it_draws_over_its_base(store, tmp_path):
    manifest = convert(store, "style@1", "onnx-fp32", cache=tmp_path)
    assert (manifest.ref, manifest.form, generator_card(manifest).base) == ("style@2", "adapter", "base@1")
    assert manifest.exports["onnx-fp32"].max_abs_difference < 1e-3
    assert not any(path.startswith(("unet/", "vae/", "text_encoder/")) for path in manifest.files)

    lora = load_artifact(store, "style@1", tmp_path)
    made = generate(lora, lora.encode_prompts(list(PROMPTS)), 2, seed=2, num_steps=2, guidance=3.0).numpy()
    with lora.off():
        plain = generate(
            lora, lora.encode_prompts(list(PROMPTS)), 2, seed=2, num_steps=2, guidance=3.0
        ).numpy()
    assert np.abs(made - plain).max() > 1e-2, "the factors matter"
    np.testing.assert_allclose(served(store, "style@2", "onnxruntime", tmp_path), made, atol=2e-3)
    np.testing.assert_allclose(served(store, "style@2", "torch", tmp_path), made, atol=1e-4)


def test_an_adapter_without_its_base_cannot_be_converted(store, tmp_path):
    alone = ArtifactStore(tmp_path / "store")
    alone.publish(store.fetch("style@1"), store.manifest("style@1"))
    with pytest.raises(ArtifactError, match="is an adapter over base@1, which is missing"):
        convert(alone, "style", "onnx-fp32")

"""A denoiser that wraps around is exported as one: the graph's own output moves with its input."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.kinds.cards import described, generator_card
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.tileable import make_tileable
from distill_core.recipe.tables import NetworkConfig
from distillery_converter.convert import convert


def exported(folder, *, tileable: bool) -> onnxruntime.InferenceSession:
    """A small UNet, published, converted and opened as the sampler's backend would."""
    torch.manual_seed(0)
    args = {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    config = NetworkConfig(name="UNet2DModel", args=args)
    denoiser = build_denoiser(config, parameterisation="flow", shape=(3, 16, 16), num_classes=3)
    if tileable:
        make_tileable(denoiser)
    denoiser.save(folder / "model")
    store = ArtifactStore(folder / "store")
    store.publish(folder / "model", Manifest(name="textures", **described(denoiser)))
    manifest = convert(store, "textures@1", "onnx-fp32", job="job-1")
    assert generator_card(manifest).image is not None
    assert generator_card(manifest).image.tileable == tileable
    (graph,) = (file for file in store.fetch(manifest.ref).rglob("*.onnx"))
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("tileable", [True, False])
def test_the_exported_graph_wraps_around_as_the_model_does(tileable, tmp_path):
    session = exported(tmp_path, tileable=tileable)
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)

    def run(x_sigma: np.ndarray) -> np.ndarray:
        given = {"x_sigma": x_sigma, "sigma": np.ones(3, np.float32), "class_label": np.arange(3)}
        return session.run(None, given)[0]

    back = np.roll(run(np.roll(x, (4, 6), (2, 3))), (-4, -6), (2, 3))
    difference = np.abs(back - run(x)).max()
    assert difference < 1e-4 if tileable else difference > 0.05

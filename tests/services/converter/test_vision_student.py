"""A student of transformers' classes from its recipe to a server: published, exported, and served without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core import api
from distill_core.artifacts import ArtifactStore
from distill_core.networks.predictor import load_predictor
from distillery_converter.convert import convert
from tests.helpers import tiny_context, tiny_recipe
from tests.services.sampler.helpers import SamplerProcess

DEIT = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
RESNET = {"hidden_sizes": [8, 16], "depths": [1, 1]}


def published(root, name: str, args: dict) -> ArtifactStore:
    """A student of two steps in a store, as version 1 of `reader`."""
    torch.set_num_threads(1)
    context = tiny_context(root)
    recipe = tiny_recipe("kd", **{"network.name": name, "network.args": args, "ema": {"student": 0.6}})
    recipe = recipe.override({"publish.name": "reader", "seed": 3})
    api.train(recipe, root / "run", context)
    return context.store


@pytest.mark.parametrize(
    ("name", "args"),
    [("DeiTForImageClassificationWithTeacher", DEIT), ("ResNetForImageClassification", RESNET)],
)
def test_a_student_is_exported_and_answers_from_a_server_as_in_torch(name, args, tmp_path):
    store = published(tmp_path, name, args)
    manifest = convert(store, "reader@1", "onnx-fp32")
    graph = manifest.exports["onnx-fp32"].graphs["predict"]
    assert graph.agreement == 1
    images = np.random.default_rng(9).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    model = load_predictor(store.fetch(manifest.ref))
    expected = model.call("predict", {"image": torch.from_numpy(images)})["logits"].numpy()
    with (
        SamplerProcess(store.url, {"DISTILLERY_SAMPLER_PRELOAD": '["reader"]'}) as process,
        process.client() as client,
    ):
        answer = client.predict("reader", image=images)["logits"]
        listed = {one.name: one for one in client.models()}
    np.testing.assert_allclose(answer, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert "reader" in listed

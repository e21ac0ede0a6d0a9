"""Students of few bits, of two heads and beside exits: published, exported, and served as torch answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core import api
from distill_core.networks.predictor import load_predictor
from distillery_converter.convert import convert
from tests.helpers import tiny_context, tiny_recipe
from tests.services.sampler.helpers import SamplerProcess

IMAGES = np.random.default_rng(9).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)


def published(name, root):
    """The store that holds a student of two steps of this recipe as version 1 of `reader`, and its manifest."""
    torch.set_num_threads(1)
    context = tiny_context(root)
    recipe = tiny_recipe(name).override({"publish.name": "reader", "seed": 3})
    return context.store, api.train(recipe, root / "run", context).manifest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ofa", "deit_lt", "differentiable_quantization"])
def test_a_student_s_graph_answers_as_torch_does(name, tmp_path):
    store, _ = published(name, tmp_path)
    manifest = convert(store, "reader@1", "onnx-fp32")
    assert manifest.exports["onnx-fp32"].graphs["predict"].agreement == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_student_of_two_bits_is_small_in_the_store_and_is_exported_and_served_as_it_is(tmp_path):
    store, first = published("quantized", tmp_path)
    size = next(file.size for name, file in first.files.items() if name.endswith("model.safetensors"))
    assert size < 4 * first.card["parameters"] / 3
    assert first.card["packed_bits"] == 2
    manifest = convert(store, "reader@1", "onnx-fp32")
    assert convert(store, "reader@1", "onnx-int8").exports["onnx-int8"].graphs["predict"].agreement > 0.8
    model = load_predictor(store.fetch(manifest.ref))
    expected = model.call("predict", {"image": torch.from_numpy(IMAGES)})["logits"].numpy()
    with (
        SamplerProcess(store.url, {"DISTILLERY_SAMPLER_PRELOAD": '["reader"]'}) as process,
        process.client() as client,
    ):
        answer = client.predict("reader", image=IMAGES)["logits"]
    np.testing.assert_allclose(answer, expected, atol=1e-4 * max(1, np.abs(expected).max()))

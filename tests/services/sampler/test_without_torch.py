"""A sampler that serves ONNX models alone, where torch cannot be imported, as in its image."""

from __future__ import annotations

import os

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ArtifactError
from tests.services.sampler.helpers import SamplerProcess, class_means, publish_denoiser


@pytest.fixture
def blocked(tmp_path) -> dict[str, str]:
    """An environment in which `import torch` fails, and so does what the ONNX image does not have."""
    for name in ("torch", "diffusers", "transformers"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "blocked"), os.environ.get("PYTHONPATH", "")])}


def test_every_service_answers_without_torch(tmp_path, blocked):
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "one")
    publish_denoiser(store, tmp_path / "two")
    made = store.manifest("digits@1")
    bare = {"exports": {}, "name": "torchonly"}
    store.publish(tmp_path / "one", made.model_copy(update=bare))
    environment = {**blocked, "DISTILLERY_SAMPLER_PRELOAD": '["digits@1"]'}
    with SamplerProcess(store.url, environment) as sampler, sampler.client() as client:
        assert [event["model"] for event in sampler.events if event["event"] == "model loaded"] == [
            "digits@1"
        ]
        (picture,) = client.generate("digits", class_labels=[3], seed=4)
        assert float(((picture.transpose(2, 0, 1) / 127.5 - 1) * class_means()[3]).sum()) > 1
        listed = {(model.name, model.version): model for model in client.models(all_versions=True)}
        assert listed["digits", 1].backend == "onnxruntime"
        assert listed["digits", 1].memory_bytes > 0
        assert listed["digits", 1].instances * listed["digits", 1].threads >= 1
        triton = InferenceServerClient(sampler.address)
        seed, label = InferInput("seed", [1, 1], "UINT64"), InferInput("class_label", [1, 1], "INT64")
        seed.set_data_from_numpy(np.array([[4]], np.uint64))
        label.set_data_from_numpy(np.array([[3]], np.int64))
        answered = triton.infer("digits", [seed, label]).as_numpy("images")
        assert answered.shape == (1, 8, 8, 1)
        config = triton.get_model_config("digits").config
        assert config.instance_group[0].count == listed["digits", 2].instances
        with pytest.raises(ArtifactError, match="torchonly@1 cannot be loaded"):
            client.generate("torchonly", class_labels=[1])

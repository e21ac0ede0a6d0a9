"""Fields as two ONNX graphs: what ONNX Runtime computes is what PyTorch computes, for any number of points."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest, SceneSpec
from distill_core.config import NetworkConfig
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import build_field
from distill_core.radiance.renderer import Scene, load_scene, save_scene
from distillery_converter.convert import convert

ARGS = {
    "hash": {"levels": 4, "log2_table_size": 10, "max_resolution": 64},
    "mlp": {"width": 16, "layers": 2},
    "vm": {"resolution": 12},
    "cp": {"resolution": 12},
    "tensors": {"resolution": 8},
    "sparse": {"resolution": 8, "capacity": 300},
}
SPEC = SceneSpec(field="", bound=1.3, radius=3.0)


def publish(root, kind: str) -> ArtifactStore:
    torch.manual_seed(0)
    field = build_field(NetworkConfig(name=kind, args=ARGS.get(kind, {})), SPEC.bound)
    for value in field.parameters():  # of the size that training gives them
        torch.nn.init.normal_(value.data, std=0.5)
    save_scene(Scene(field, torch.ones(4, 4, 4, dtype=torch.bool), SPEC, 32), root / "model")
    store = ArtifactStore(root / "store")
    store.publish(root / "model", Manifest(name="scene", kind="field", scene=SPEC))
    return store


@pytest.mark.parametrize("kind", ARGS)
def test_both_blocks_agree_with_pytorch_on_any_number_of_points(kind, tmp_path):
    store = publish(tmp_path, kind)
    manifest = convert(store, "scene@1", "onnx-fp32")
    report = manifest.exports["onnx-fp32"]
    assert report.files == ("exports/onnx-fp32/block1.onnx", "exports/onnx-fp32/block2.onnx")
    assert report.rel_l2 < 1e-4
    folder = store.fetch(manifest.ref)
    field = load_scene(folder).field
    block1, block2 = (
        onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        for file in report.files
    )
    generator = torch.Generator().manual_seed(1)
    positions = SPEC.bound * (2.4 * torch.rand(3000, 3, generator=generator) - 1.2)  # some outside of the box
    directions = torch.nn.functional.normalize(torch.randn(3000, 3, generator=generator), dim=-1)
    (found,) = block1.run(None, {"positions": positions.numpy()})
    with torch.inference_mode():
        log_density, geo = field.block1(positions)
        radiance = field.block2(geo, directions)
    assert float(log_density.std()) > 0.1
    scale = float(geo.abs().max())
    np.testing.assert_allclose(found[:, 0], log_density.numpy(), atol=2e-4)
    np.testing.assert_allclose(found[:, 1:], geo.numpy(), atol=2e-4 * max(1.0, scale))
    (seen,) = block2.run(None, {"geo": geo.numpy(), "directions": directions.numpy()})
    np.testing.assert_allclose(seen, radiance.numpy(), atol=1e-4)


def test_fields_are_refused_in_other_precisions_and_formulas_altogether(tmp_path):
    store = publish(tmp_path, "mlp")
    with pytest.raises(ConfigError, match="onnx-fp32 only"):
        convert(store, "scene@1", "onnx-fp16")
    formula = publish(tmp_path / "formula", "analytic")
    with pytest.raises(ArtifactError, match="without weights"):
        convert(formula, "scene@1", "onnx-fp32")

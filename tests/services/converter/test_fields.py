"""Fields as two ONNX graphs: what ONNX Runtime computes is what PyTorch computes, for any number of points."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest, SceneSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import build_field
from distill_core.radiance.scenes.scene import Scene, load_scene, save_scene
from distill_core.recipe.tables import NetworkConfig
from distillery_converter import onnx as exporting
from distillery_converter import parity
from distillery_converter.convert import convert
from distillery_converter.fields import field_graphs
from distillery_converter.precision import half_field
from distillery_converter.targets import TARGETS

pytestmark = pytest.mark.timeout(900)

ARGS = {
    "hash": {"levels": 4, "log2_table_size": 10, "max_resolution": 64},
    "mlp": {"width": 16, "layers": 2},
    "vm": {"resolution": 12},
    "cp": {"resolution": 12},
    "tensors": {"resolution": 8},
    "sparse": {"resolution": 8, "capacity": 300},
}
GAINLESS = {("hash", "onnx-int8")}  # most of its bytes are tables, and its layers are tiny here
SPEC = SceneSpec(field="", bound=1.3, radius=3.0)


def publish(root, kind: str) -> ArtifactStore:
    torch.manual_seed(0)
    field = build_field(NetworkConfig(name=kind, args=ARGS.get(kind, {})), SPEC.bound)
    for value in field.parameters():  # of the size that training gives them
        torch.nn.init.normal_(value.data, std=0.5)
    save_scene(Scene(field, torch.ones(4, 4, 4, dtype=torch.bool), SPEC, 32), root / "model")
    store = ArtifactStore(root / "store")
    store.publish(root / "model", Manifest(name="scene", kind="field", card={"scene": SPEC.model_dump()}))
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


@pytest.mark.parametrize("kind", ["mlp", "hash", "vm"])
@pytest.mark.parametrize("target", ["onnx-fp16", "onnx-int8"])
def test_a_field_gives_up_float32_only_where_the_gates_hold_and_its_files_shrink(kind, target, tmp_path):
    store = publish(tmp_path, kind)
    goal = TARGETS[target]
    if (kind, target) in GAINLESS:
        with pytest.raises(ArtifactError, match=r"no part of this model gains.*block1: .*block2: "):
            convert(store, "scene@1", target)
        assert store.versions("scene") == [1]
        return
    manifest = convert(store, "scene@1", target)
    report = manifest.exports[target]
    assert report.frechet is None
    low = [one for one in report.graphs.values() if one.precision == goal.precision]
    assert low
    assert all(one.rel_l2 <= goal.rel_l2 for one in low)
    assert all(one.left_in_float for one in report.graphs.values() if one.precision == "fp32")
    full = convert(store, "scene@1", "onnx-fp32").exports["onnx-fp32"]
    for name, one in report.graphs.items():
        if one.precision == goal.precision:
            assert one.size <= 0.9 * full.graphs[name].size
        else:
            assert one.size == full.graphs[name].size


def test_a_hash_fields_tables_are_in_float16_and_its_positions_are_not(tmp_path):
    store = publish(tmp_path, "hash")
    (graph,) = field_graphs(store.fetch("scene@1"), TARGETS["onnx-fp16"])[:1]
    source, target = exporting.export(graph, tmp_path), tmp_path / "half.onnx"
    half_field(source, target)
    onnx.checker.check_model(str(target), full_check=True)
    model = onnx.load(target)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    tables = [one for one in model.graph.initializer if one.data_type in floats and math.prod(one.dims) > 500]
    assert {one.data_type for one in tables} == {onnx.TensorProto.FLOAT16}
    assert [value.type.tensor_type.elem_type for value in model.graph.output] == [onnx.TensorProto.FLOAT]
    floors = {name for node in model.graph.node if node.op_type == "Floor" for name in node.output}
    given = onnx.shape_inference.infer_shapes(model).graph.value_info
    assert {value.type.tensor_type.elem_type for value in given if value.name in floors} == {
        onnx.TensorProto.FLOAT
    }
    found = parity.compare(graph, parity.onnx_runner(target), as_served=True)
    assert 1e-6 < found.rel_l2 <= 1e-2


def test_fields_are_refused_as_engines_and_formulas_altogether(tmp_path):
    store = publish(tmp_path, "mlp")
    with pytest.raises(ConfigError, match="not converted to trt-fp16: .* thousands of points"):
        field_graphs(store.fetch("scene@1"), TARGETS["trt-fp16"])
    formula = publish(tmp_path / "formula", "analytic")
    with pytest.raises(ArtifactError, match="without weights"):
        convert(formula, "scene@1", "onnx-fp32")

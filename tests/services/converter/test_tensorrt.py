"""Engine building against a stand-in for NVIDIA's package; the `gpu` test runs the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, load
from torch import nn

from distill_core.errors import ArtifactError, Unavailable
from distill_core.tensorrt import building as engine_building
from distill_core.tensorrt import engines
from distill_core.tensorrt.engines import Host
from distillery_converter import onnx, parity, tensorrt
from distillery_converter.graph import Graph
from distillery_converter.graphs import denoiser_graph
from distillery_converter.precision import lowered
from distillery_converter.targets import TARGETS
from tests.services.converter.tensorrt_stand_in import HOST, install
from tests.services.converter.test_converter import tiny_denoiser


@pytest.fixture
def trt(monkeypatch):
    monkeypatch.setattr(tensorrt, "this_host", lambda: HOST)
    return install(monkeypatch)


class Double(nn.Module):
    def forward(self, x_sigma):
        return 2 * x_sigma


GRAPH = Graph("double", Double(), ("x0",), lambda batch: {"x_sigma": np.ones((batch, 1, 4, 4), np.float32)})
PROFILE = {"x_sigma": ((1, 1, 4, 4), (8, 1, 4, 4), (32, 1, 4, 4))}


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "double.onnx"
    path.write_bytes(b"an onnx file")
    return path


def test_an_engine_is_built_with_a_profile_and_says_where_it_runs(trt, source, tmp_path):
    with pytest.raises(
        ArtifactError, match="double.plan is damaged; rebuild it"
    ):  # the stand-in cannot run plans
        tensorrt.build([source], [GRAPH], tmp_path / "out", target="trt-fp16", cache=tmp_path / "cache")
    info = engines.require_host(tmp_path / "out", HOST)
    assert (info.target, info.host) == ("trt-fp16", HOST)
    assert {name: tuple(map(tuple, shapes)) for name, shapes in info.engines[0].profile.items()} == PROFILE
    assert len(info.engines[0].onnx_sha256) == 64
    assert (tmp_path / "out" / "double.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize(
    "here",
    [
        Host(tensorrt="10.9.0", gpu="NVIDIA L4", compute_capability="8.9"),
        Host(tensorrt="11.4.0", gpu="NVIDIA H100", compute_capability="9.0"),
    ],
)
def test_an_engine_of_another_gpu_or_version_is_refused_with_the_way_to_rebuild_it(
    trt, source, tmp_path, here
):
    with pytest.raises(ArtifactError, match="damaged"):
        tensorrt.build([source], [GRAPH], tmp_path, target="trt-fp16", cache=tmp_path)
    with pytest.raises(
        ArtifactError,
        match="built by TensorRT 11.4.0 on NVIDIA L4 .* distillery convert MODEL --target trt-fp16",
    ):
        engines.require_host(tmp_path, here)


def test_kernel_timings_are_kept_between_builds(trt, source, tmp_path):
    timings = tmp_path / "cache" / "nvidia-l4.timings"
    assert engine_building.build_plan(source, PROFILE, timings=timings) == b"a plan"
    engine_building.build_plan(source, PROFILE, timings=timings)
    assert timings.read_bytes() == b"+timed+timed"
    timings.write_bytes(b"of another version")
    engine_building.build_plan(source, PROFILE, timings=timings)
    assert timings.read_bytes() == b"+timed"


def built(trt, source, folder, graph=GRAPH) -> bool:
    """Whether TensorRT was asked for a plan on the way to engines in `folder`."""
    trt.built.clear()
    with pytest.raises(ArtifactError, match="damaged"):  # the stand-in cannot run plans
        tensorrt.build([source], [graph], folder / "out", target="trt-bf16", cache=folder / "cache")
    return bool(trt.built)


def test_an_engine_is_built_once_for_a_graph_a_machine_and_a_profile(trt, source, tmp_path, monkeypatch):
    assert built(trt, source, tmp_path)
    (tmp_path / "out" / "double.plan").unlink()
    assert not built(trt, source, tmp_path)
    assert (tmp_path / "out" / "double.plan").read_bytes() == b"a plan"
    wider = Graph(
        "double", Double(), ("x0",), lambda batch: {"x_sigma": np.ones((batch, 1, 8, 8), np.float32)}
    )
    assert built(trt, source, tmp_path, wider)
    source.write_bytes(b"another onnx file")
    assert built(trt, source, tmp_path)
    source.with_name("double.onnx.data").write_bytes(b"weights beside it")
    assert built(trt, source, tmp_path)
    monkeypatch.setattr(tensorrt, "this_host", lambda: HOST.model_copy(update={"gpu": "NVIDIA H100"}))
    assert built(trt, source, tmp_path)
    assert not built(trt, source, tmp_path)


def test_a_kept_engine_that_was_damaged_is_built_again(trt, source, tmp_path):
    assert built(trt, source, tmp_path)
    (kept,) = (tmp_path / "cache" / "tensorrt" / "plans").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert built(trt, source, tmp_path)
    assert (tmp_path / "out" / "double.plan").read_bytes() == b"a plan"


def test_a_graph_that_tensorrt_cannot_read_is_an_error_with_its_reasons(trt, source, tmp_path):
    trt.OnnxParser.errors = ("unknown operator Foo", "bad shape")
    with pytest.raises(ArtifactError, match="cannot read double.onnx: unknown operator Foo; bad shape"):
        engine_building.build_plan(source, PROFILE, timings=tmp_path / "t")


def test_a_build_that_fails_is_an_error_and_not_an_empty_engine(trt, source, tmp_path):
    trt.Builder.plan = None
    with pytest.raises(ArtifactError, match="could not build double.onnx: no kernel for this layer"):
        engine_building.build_plan(source, PROFILE, timings=tmp_path / "t")


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    with pytest.raises(Unavailable, match=r"TensorRT is not installed; .*\[trt\]"):
        engines.this_host()


@pytest.mark.parametrize(("precision", "stored"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_the_graph_that_tensorrt_is_given_says_the_precision(precision, stored, tmp_path):
    denoiser = tiny_denoiser()
    graph = denoiser_graph(denoiser, denoiser.sampler)
    low = lowered(graph, precision)
    path = onnx.export(low, tmp_path, opset=onnx.OPSETS[precision])
    model = load(str(path))
    kinds = {TensorProto.DataType.Name(weight.data_type) for weight in model.graph.initializer}
    assert stored in kinds
    ends = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert set(ends) == {TensorProto.FLOAT, TensorProto.INT64}
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    assert convolution.input[1] in {
        weight.name for weight in model.graph.initializer if weight.data_type == getattr(TensorProto, stored)
    }
    found = parity.compare(graph, low.run)
    gate = TARGETS[f"trt-{precision}"]
    assert 0 < found.rel_l2 <= gate.rel_l2
    assert found.scaled_max_abs <= gate.max_abs


@pytest.mark.gpu
def test_a_real_engine_computes_what_torch_computes(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    pytest.importorskip("tensorrt")
    source = onnx.export(GRAPH, tmp_path / "onnx")
    runs = tensorrt.build([source], [GRAPH], tmp_path / "out", target="trt-fp32", cache=tmp_path / "cache")
    assert parity.compare(GRAPH, runs[0]).max_abs == 0

"""Graphs that the sampler rewrites for ONNX Runtime on the CPU: what is written anew, and that it computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill_core.errors import ArtifactError
from distillery_sampler.backends import onnx_backend
from distillery_sampler.backends.rewriting import rewritten

CHANNELS, WIDTH = 24, 10
TOLERANCE = 1e-5  # of values up to 5: sums of 216 products in another order


def written(
    path: Path,
    *,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    out: tuple[int, int] = (CHANNELS, WIDTH),
    unknown: Sequence[str] = (),
) -> Path:
    """A graph of `x` (N, CHANNELS, H, W) to `y`, its widths known as the exporter writes them, its heights not."""
    channels, width = out
    inner = [
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["N", channels, "H", width])
        for node in nodes
        if node.output[0] not in unknown
    ]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", [nodes[-1].output[0]], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=inner,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 10


def upsampled(
    path: Path, resize: dict[str, Any] | None = None, conv: dict[str, Any] | None = None, **more: Any
) -> Path:
    """Upsampling by 2, then a 3x3 convolution to 20 channels, but for what is given otherwise."""
    scales = more.pop("scales", [1, 1, 2, 2])
    side = (conv or {}).get("kernel_shape", [3, 3])[0]
    asked = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    how = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["wide"], **asked | (resize or {})),
        helper.make_node("Conv", ["wide", "weight", "bias"], ["convolved"], **how | (conv or {})),
        *more.pop("after", []),
    ]
    groups = (conv or {}).get("group", 1)
    weights = {
        "scales": np.array(scales, np.float32),
        "weight": normal(24, CHANNELS // groups, side, side),
        "bias": normal(24),
    }
    return written(path, nodes=nodes, weights=weights, out=(24, 2 * WIDTH), **more)


def operations(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


def computed(model: bytes | str, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def assert_the_same(path: Path, new: bytes, heights: tuple[int, ...] = (1, 2, 7)) -> None:
    for height in heights:
        x = normal(3, CHANNELS, height, WIDTH) * 10
        np.testing.assert_allclose(computed(new, x), computed(str(path), x), atol=TOLERANCE)


def test_a_convolution_of_upsampled_rows_looks_at_two_of_them(tmp_path):
    path = upsampled(tmp_path / "up.onnx")
    new = rewritten(path)
    assert new is not None
    nodes = onnx.load_from_string(new).graph.node
    kernels = [helper.get_attribute_value(a) for n in nodes for a in n.attribute if a.name == "kernel_shape"]
    assert kernels == [[2, 3], [2, 3]]
    names = {tensor.name for tensor in onnx.load_from_string(new).graph.initializer}
    assert not {"weight", "scales"} & names  # nothing is held that no node reads
    assert_the_same(path, new)


def test_a_convolution_to_few_channels_is_a_transposed_one(tmp_path):
    conv = helper.make_node(
        "Conv", ["x", "weight"], ["few"], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1],
        dilations=[1, 1], group=1,
    )  # fmt: skip
    path = written(tmp_path / "few.onnx", nodes=[conv], weights={"weight": normal(3, CHANNELS, 3, 3)})
    new = rewritten(path)
    assert new is not None
    assert operations(new) == {"ConvTranspose": 1, "Identity": 1}
    assert_the_same(path, new)


def scaled(
    path: Path,
    scale: tuple[int, ...],
    *,
    before: Sequence[onnx.NodeProto] = (),
    after: Sequence[onnx.NodeProto] = (),
) -> Path:
    """A scale and a shift of `x`, or of what the nodes `before` make of it: `mean`."""
    nodes = [
        *before,
        helper.make_node("Mul", ["mean" if before else "x", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
        *after,
    ]
    weights = {"axis": np.array([1]), "groups": np.array([0, 4, -1]), "shift": 1 - normal(*scale)}
    return written(
        path, nodes=nodes, weights={**weights, "scale": normal(*scale)}, unknown=("mean", "grouped", "shape")
    )


def test_a_scale_and_a_shift_by_channel_are_one_pass(tmp_path):
    path = scaled(tmp_path / "scaled.onnx", (CHANNELS, 1, 1))
    new = rewritten(path)
    assert new is not None
    assert operations(new) == {"BatchNormalization": 1, "Identity": 1}
    assert_the_same(path, new)


TWICE = [helper.make_node("Add", ["convolved", "wide"], ["sum"])]
NESTED = [
    helper.make_node(
        "If",
        ["yes"],
        ["chosen"],
        **{
            branch: helper.make_graph(
                [helper.make_node("Identity", ["wide"], [branch])],
                branch,
                [],
                [helper.make_tensor_value_info(branch, TensorProto.FLOAT, None)],
            )
            for branch in ("then_branch", "else_branch")
        },
    )
]


@pytest.mark.parametrize(
    "changed",
    [
        {"resize": {"mode": "linear"}},
        {"resize": {"nearest_mode": "ceil"}},
        {"scales": [1, 1, 2, 3]},
        {"conv": {"kernel_shape": [5, 5], "pads": [2] * 4}},
        {"conv": {"dilations": [2, 2], "pads": [2] * 4}},
        {"conv": {"strides": [2, 2]}},
        {"conv": {"group": 2}},
        {"after": TWICE},
    ],
    ids=str,
)
def test_what_is_not_quite_that_stays(tmp_path, changed):
    assert rewritten(upsampled(tmp_path / "other.onnx", **changed)) is None


@pytest.mark.parametrize("scale", [(1,), (CHANNELS, 1, WIDTH), (1, CHANNELS, 1, 1)], ids=str)
def test_another_scale_stays(tmp_path, scale):
    assert rewritten(scaled(tmp_path / "other.onnx", scale)) is None


def test_what_is_scaled_to_more_channels_stays(tmp_path):
    mean = helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=1)
    path = scaled(tmp_path / "more.onnx", (CHANNELS, 1, 1), before=[mean])
    assert rewritten(path) is None


def test_the_shape_may_be_another_values(tmp_path):
    """As group norms are exported: normalised by group, then back to the shape of what came in."""
    nodes = [
        helper.make_node("Reshape", ["x", "groups"], ["grouped"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["grouped", "shape"], ["mean"]),
    ]
    path = scaled(tmp_path / "norm.onnx", (CHANNELS, 1, 1), before=nodes)
    new = rewritten(path)
    assert new is not None
    assert operations(new)["BatchNormalization"] == 1
    assert_the_same(path, new)


def test_a_value_that_others_read_is_kept(tmp_path):
    after = [helper.make_node("Add", ["shifted", "scaled"], ["sum"])]
    assert rewritten(scaled(tmp_path / "read.onnx", (CHANNELS, 1, 1), after=after)) is None


def test_a_constant_in_another_file_stays_under_the_runtimes_eyes(tmp_path):
    """ONNX Runtime refuses files outside the model's folder; of a model without a path it would not know."""
    model = onnx.load(str(upsampled(tmp_path / "up.onnx")))
    outside = TensorProto(dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../secret.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["aside"], value=outside))
    model.graph.output.append(helper.make_tensor_value_info("aside", TensorProto.FLOAT, [1]))
    (tmp_path / "outside.onnx").write_bytes(model.SerializeToString())
    assert rewritten(tmp_path / "outside.onnx") is None


def test_weights_in_other_files_and_nested_graphs_stay(tmp_path):
    path = upsampled(tmp_path / "up.onnx")
    model = onnx.load(str(path))
    onnx.save(model, str(tmp_path / "outside.onnx"), save_as_external_data=True, size_threshold=0)
    assert rewritten(tmp_path / "outside.onnx") is None
    model = onnx.load(str(path))  # saving moved the weights
    model.graph.node.extend(NESTED)
    onnx.save(model, str(tmp_path / "nested.onnx"))
    assert rewritten(tmp_path / "nested.onnx") is None


def test_a_weight_that_a_caller_may_replace_stays(tmp_path):
    model = onnx.load(str(upsampled(tmp_path / "up.onnx")))
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [24, CHANNELS, 3, 3]))
    onnx.save(model, str(tmp_path / "given.onnx"))
    assert rewritten(tmp_path / "given.onnx") is None


def test_an_operator_of_the_same_name_that_is_not_onnx_own_stays(tmp_path):
    model = onnx.load(str(upsampled(tmp_path / "up.onnx")))
    model.graph.node[1].domain = "com.microsoft.nchwc"
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    onnx.save(model, str(tmp_path / "other.onnx"))
    assert rewritten(tmp_path / "other.onnx") is None


def test_half_precision_stays(tmp_path):
    model = onnx.load(str(upsampled(tmp_path / "up.onnx")))
    for tensor in model.graph.initializer:
        if tensor.name != "scales":
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
            )
    onnx.save(model, str(tmp_path / "half.onnx"))
    assert rewritten(tmp_path / "half.onnx") is None


def test_a_session_runs_the_rewritten_graph_unless_told_not_to(tmp_path):
    path, x = upsampled(tmp_path / "up.onnx"), normal(2, CHANNELS, 7, WIDTH) * 10
    plain = onnx_backend.Session(path, 1, rewrite=False)({"x": x})
    new = onnx_backend.Session(path, 1)({"x": x})
    assert np.array_equal(plain, computed(str(path), x))
    assert not np.array_equal(plain, new)  # sums in another order
    np.testing.assert_allclose(plain, new, atol=TOLERANCE)


def test_a_damaged_file_is_refused_with_a_sentence(tmp_path):
    path = upsampled(tmp_path / "up.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"up\.onnx cannot be loaded: "):
        onnx_backend.Session(path, 1)

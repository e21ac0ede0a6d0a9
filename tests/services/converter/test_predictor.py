"""Predictors as ONNX files, one a function: names of the signature, any batch, every precision through its gates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.cards import described
from distill_core.kinds.predictor.kind import KIND
from distill_core.networks import predictors
from distill_core.networks.predictor import Predictor, PredictorFile, image_classifier, load_predictor
from distill_core.networks.predictors import build_network
from distill_core.probe import write_probe
from distill_core.recipe.tables import NetworkConfig
from distill_core.signature import Function, TensorSpec
from distillery_cli.models.store import _export
from distillery_converter.convert import convert

NAMES = tuple("abcdefg")
SHAPE = (1, 9, 8)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def classifier() -> Predictor:
    torch.manual_seed(3)
    config = NetworkConfig(name="classifier", args={"width": 16, "num_features": 12})
    facts = {"shape": SHAPE, "num_classes": len(NAMES), "class_names": NAMES}
    network = build_network(config, facts)
    for value in network.parameters():  # logits of the size that training gives them
        if value.ndim > 1:
            nn.init.kaiming_normal_(value.data)
    return image_classifier(network, config, shape=SHAPE, class_names=NAMES)


def kernel_machine() -> Predictor:
    torch.manual_seed(4)
    config = NetworkConfig(name="kernel_machine", args={"gamma": 0.07, "num_items": 11})
    network = build_network(config, {"shape": SHAPE, "num_classes": len(NAMES)})
    network.items.uniform_(-1, 1)
    nn.init.normal_(network.coefficients.data, std=30)
    return image_classifier(network, config, shape=SHAPE, class_names=NAMES)


def spec(*shape: int, dtype: str = "float32", **bounds: object) -> TensorSpec:
    return TensorSpec.parse({"dtype": dtype, "shape": shape, **bounds})


class PairArgs(Config):
    inputs: int = 6
    codes: int = 4


class Pair(nn.Module):
    """An encoder with two outputs, one of them a class, and a decoder of a code and a shift."""

    Args = PairArgs

    def __init__(self, args: PairArgs) -> None:
        super().__init__()
        self.args = args
        self.down = nn.Linear(args.inputs, args.codes)
        self.up = nn.Linear(args.codes, args.inputs)

    def encode(self, row):
        code = self.down(row).tanh()
        return code, code.argmax(-1)

    def decode(self, code, shift):
        return self.up(code) + shift[:, None]


class Signal(nn.Module):
    """A filter of signals of any even length; `fixed` forgets that and reads the first 6 values alone."""

    class Args(Config):
        fixed: bool = False

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.args, self.filter = args, nn.Conv1d(2, 3, 3, padding=1)

    def forward(self, iq, gain):
        filtered = self.filter(iq) * gain[:, None, None]
        return filtered.reshape(-1, 3, 6) if self.args.fixed else filtered


@pytest.fixture
def _networks(monkeypatch):
    known = {**predictors.network_types(), "pair": Pair, "signal": Signal}
    monkeypatch.setattr(predictors, "network_types", lambda: known)


def pair() -> Predictor:
    torch.manual_seed(5)
    encode = Function(
        inputs={"row": spec(6, low=-2, high=2)}, outputs={"code": spec(4), "cluster": spec(dtype="int64")}
    )
    decode = Function(inputs={"code": spec(4), "shift": spec()}, outputs={"restored": spec(6)})
    config = NetworkConfig(name="pair", args={"inputs": 6, "codes": 4})
    return Predictor(
        build_network(config), PredictorFile(network=config, functions={"encode": encode, "decode": decode})
    )


def signal(**args: object) -> Predictor:
    torch.manual_seed(6)
    iq = spec(2, -1, max_shape=(2, 48), multiple_of=2)
    predict = Function(
        inputs={"iq": iq, "gain": spec()},
        outputs={"filtered": iq.model_copy(update={"shape": (3, -1), "max_shape": (3, 48)})},
    )
    config = NetworkConfig(name="signal", args=args)
    return Predictor(build_network(config), PredictorFile(network=config, functions={"predict": predict}))


def publish(root: Path, model: Predictor) -> ArtifactStore:
    model.eval().save(root / "model")
    write_probe(root / "model", KIND.probe(model))
    store = ArtifactStore(root / "store")
    store.publish(root / "model", Manifest(name="reader", **described(model)))
    return store


def session(store: ArtifactStore, manifest: Manifest, target: str, function: str = "predict"):
    path = store.fetch(manifest.ref) / f"exports/{target}/{function}.onnx"
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("build", [classifier, kernel_machine])
def test_plain_onnxruntime_answers_by_the_names_of_the_signature_at_any_batch(build, tmp_path):
    store = publish(tmp_path, build())
    manifest = convert(store, "reader@1", "onnx-fp32")
    report = manifest.exports["onnx-fp32"]
    assert report.files == ("exports/onnx-fp32/predict.onnx",)
    assert report.graphs["predict"].agreement == 1
    function = manifest.signature.function()
    run = session(store, manifest, "onnx-fp32")
    assert [value.name for value in run.get_inputs()] == list(function.inputs)
    assert [value.name for value in run.get_outputs()] == list(function.outputs)
    model = load_predictor(store.fetch(manifest.ref))
    for batch in (1, 3, 16):
        given = images(batch)
        (found,) = run.run(["logits"], {"image": given})
        expected = model.call("predict", {"image": torch.from_numpy(given)})["logits"].numpy()
        assert expected.std() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_the_probe_stays_beside_the_weights_and_the_export_reproduces_it(tmp_path):
    store = publish(tmp_path, classifier())
    manifest = convert(store, "reader@1", "onnx-fp32")
    probe = load_file(store.fetch(manifest.ref) / "probe.safetensors")
    (found,) = session(store, manifest, "onnx-fp32").run(None, {"image": probe["predict/inputs.image"]})
    np.testing.assert_allclose(found, probe["predict/outputs.logits"], atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_pass_their_gates_and_say_how_many_answers_agree(precision, tmp_path):
    store = publish(tmp_path, classifier())
    target = f"onnx-{precision}"
    manifest = convert(store, "reader@1", target)
    report = manifest.exports[target]
    graph = report.graphs["predict"]
    assert graph.precision == precision
    assert 0 < graph.rel_l2 <= {"fp16": 1e-2, "int8": 0.0562}[precision]
    assert 0.75 <= graph.agreement <= 1
    assert report.figures["agreement"] == graph.agreement
    assert f"{graph.agreement:.2%} of answers agree" in dict(_export(report))[".predict"]
    file = onnx.load(store.fetch(manifest.ref) / report.files[0]).graph
    low = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision]
    assert low in {weight.data_type for weight in file.initializer}
    ends = {value.type.tensor_type.elem_type for value in (*file.input, *file.output)}
    assert ends == {onnx.TensorProto.FLOAT}
    (found,) = session(store, manifest, target).run(None, {"image": images(5)})
    expected = classifier().eval()(torch.from_numpy(images(5))).detach().numpy()
    assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("target", ["onnx-fp16", "onnx-int8", "trt-bf16"])
def test_what_computes_in_float64_is_refused_in_lower_precisions(target, tmp_path, monkeypatch):
    store = publish(tmp_path, kernel_machine())
    monkeypatch.setattr("distillery_converter.tensorrt.tool_versions", dict)
    with pytest.raises(ConfigError, match=rf"reader@1 cannot be converted to {target}: .*choose onnx-fp32$"):
        convert(store, "reader@1", target)
    assert store.versions("reader") == [1]


@pytest.mark.usefixtures("_networks")
def test_each_function_is_a_file_of_its_own_with_all_of_its_outputs(tmp_path):
    store = publish(tmp_path, pair())
    manifest = convert(store, "reader@1", "onnx-fp32")
    report = manifest.exports["onnx-fp32"]
    assert report.files == ("exports/onnx-fp32/decode.onnx", "exports/onnx-fp32/encode.onnx")
    assert {name: graph.agreement for name, graph in report.graphs.items()} == {
        "encode": None,
        "decode": None,
    }
    model = load_predictor(store.fetch(manifest.ref))
    generator = np.random.default_rng(8)
    for name, function in manifest.signature.functions.items():
        run = session(store, manifest, "onnx-fp32", name)
        given = {
            key: generator.uniform(-1, 1, (7, *one.shape)).astype(np.float32)
            for key, one in function.inputs.items()
        }
        found = dict(zip(function.outputs, run.run(list(function.outputs), given), strict=True))
        expected = model.call(name, {key: torch.from_numpy(value) for key, value in given.items()})
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value.numpy(), atol=1e-5)
            assert found[key].dtype == function.outputs[key].dtype
    decoder = onnx.load(store.fetch(manifest.ref) / report.files[0]).graph
    assert sum(int(np.prod(weight.dims)) for weight in decoder.initializer if weight.dims) <= 6 * 4 + 6 + 4


@pytest.mark.usefixtures("_networks")
def test_the_worst_output_of_a_function_decides(tmp_path, monkeypatch):
    store = publish(tmp_path, pair())
    from distillery_converter import parity

    opened = parity.onnx_runner

    def other(path):
        run = opened(path)
        return lambda inputs: (*run(inputs)[:-1], run(inputs)[-1] + 1)  # the last output is wrong

    monkeypatch.setattr(parity, "onnx_runner", other)
    with pytest.raises(ArtifactError, match="in its encode"):
        convert(store, "reader@1", "onnx-fp32")
    assert store.versions("reader") == [1]


@pytest.mark.usefixtures("_networks")
@pytest.mark.parametrize("target", ["onnx-fp32", "onnx-fp16", "onnx-int8"])
def test_free_axes_stay_free(target, tmp_path):
    store = publish(tmp_path, signal())
    manifest = convert(store, "reader@1", target)
    run, model = session(store, manifest, target), load_predictor(store.fetch(manifest.ref))
    for batch, length in ((1, 2), (3, 48), (5, 10)):
        generator = torch.Generator().manual_seed(length)
        given = {
            "iq": torch.rand(batch, 2, length, generator=generator),
            "gain": torch.rand(batch, generator=generator),
        }
        (found,) = run.run(None, {key: value.numpy() for key, value in given.items()})
        expected = model.call("predict", given)["filtered"].numpy()
        assert found.shape == expected.shape == (batch, 3, length)
        assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected)


@pytest.mark.usefixtures("_networks")
def test_a_network_that_fixes_a_free_axis_is_refused(tmp_path):
    store = publish(tmp_path, signal(fixed=True))
    with pytest.raises(ArtifactError, match="iq|filtered"):
        convert(store, "reader@1", "onnx-fp32")
    assert store.versions("reader") == [1]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            Function(inputs={"words": spec(dtype="text")}, outputs={"logits": spec(3)}),
            "words of its function ask is text",
        ),
        (Function(inputs={"x": spec(3)}, outputs={"x": spec(3)}), "x is an input and an output"),
        (Function(inputs={}, outputs={"x": spec(3)}), "has no input"),
    ],
)
def test_functions_that_no_graph_can_be_made_of_are_refused_before_loading(function, said, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    store = ArtifactStore(tmp_path / "store")
    card = {"functions": {"ask": function.model_dump(mode="json")}}
    store.publish(tmp_path / "model", Manifest(name="reader", kind="predictor", card=card))
    with pytest.raises(ArtifactError, match=f"reader@1 cannot be converted: .*{said}"):
        convert(store, "reader@1", "onnx-fp32")


@pytest.mark.parametrize("name", ["../other", "a/b", "", "Predict "])
def test_a_function_whose_name_is_no_file_name_is_refused(name):
    function = Function(inputs={"x": spec(3)}, outputs={"y": spec(3)})
    with pytest.raises(ConfigError):
        PredictorFile.parse({"network": {"name": "pair"}, "functions": {name: function.model_dump()}})

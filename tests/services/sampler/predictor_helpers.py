"""Tiny models that are called by their signature: a classifier of torch, and an ONNX graph of every type of tensor."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from distill_core.artifacts import ArtifactStore, ExportReport, Manifest
from distill_core.kinds import find_kind
from distill_core.kinds.cards import described
from distill_core.kinds.predictor.card import Card
from distill_core.networks.predictor import Predictor, image_classifier
from distill_core.networks.predictors import build_network
from distill_core.probe import write_probe
from distill_core.recipe.tables import NetworkConfig
from distill_core.signature import Function, Signature, TensorSpec

SHAPE = (3, 6, 10)
CLASSES = ("cat", "dog", "eel", "fox")
REPORT = {"max_abs_difference": 0.0, "rel_l2": 0.0, "tolerance": 1e-3, "batches": (1,), "seconds": 0.0}


def classifier(seed: int) -> Predictor:
    """A classifier with random weights and a second function, the activations of its penultimate layer."""
    torch.manual_seed(seed)
    config = NetworkConfig(name="classifier", args={"width": 8, "num_features": 5})
    network = build_network(config, {"shape": SHAPE, "num_classes": len(CLASSES), "class_names": CLASSES})
    predictor = image_classifier(network, config, shape=SHAPE, class_names=CLASSES)
    features = Function(
        inputs=predictor.described.functions["predict"].inputs,
        outputs={"activations": TensorSpec(dtype="float32", shape=(5,))},
    )
    functions = {**predictor.described.functions, "features": features}
    return Predictor(network, predictor.described.model_copy(update={"functions": functions})).eval()


def publish_classifier(
    store: ArtifactStore, folder: Path, predictor: Predictor, *, name: str = "animals", probe: object = None
) -> Manifest:
    """The next version of `name`, with the probe of `predictor`, or of the other model that is given."""
    predictor.save(folder)
    write_probe(folder, find_kind("predictor").probe(probe or predictor))
    return store.publish(folder, Manifest(name=name, method="kd", **described(predictor)))


def mixed_signature() -> Signature:
    """A function that takes and answers each type of tensor, a size that is free, and a text."""
    inputs = {
        "x": TensorSpec(dtype="float16", shape=(2, 3)),
        "gain": TensorSpec(dtype="float64"),
        "votes": TensorSpec(dtype="int32", shape=(-1,), max_shape=(7,), low=0, high=9),
        "shift": TensorSpec(dtype="uint8", shape=(1,)),
        "on": TensorSpec(dtype="bool"),
        "words": TensorSpec(dtype="text"),
    }
    outputs = {
        "scaled": TensorSpec(dtype="float64", shape=(2, 3)),
        "total": TensorSpec(dtype="int64"),
        "twice": TensorSpec(dtype="int32", shape=(-1,), max_shape=(7,)),
        "off": TensorSpec(dtype="bool"),
        "said": TensorSpec(dtype="text"),
    }
    return Signature(functions={"mix": Function(inputs=inputs, outputs=outputs)})


def write_mixed(path: Path) -> None:
    """scaled = gain x + shift, total = sum of votes, twice = 2 votes, off = not on, said = words."""
    types = {"float16": "FLOAT16", "float64": "DOUBLE", "text": "STRING"}

    def infos(specs: dict[str, TensorSpec]) -> list:
        return [
            helper.make_tensor_value_info(
                name,
                TensorProto.DataType.Value(types.get(spec.dtype, spec.dtype.upper())),
                ["batch", *("free" if size == -1 else size for size in spec.shape)],
            )
            for name, spec in specs.items()
        ]

    nodes = [
        helper.make_node("Cast", ["x"], ["x64"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["shift"], ["shift64"], to=TensorProto.DOUBLE),
        helper.make_node("Unsqueeze", ["gain", "axes"], ["gain3"]),
        helper.make_node("Unsqueeze", ["shift64", "axis"], ["shift3"]),
        helper.make_node("Mul", ["x64", "gain3"], ["product"]),
        helper.make_node("Add", ["product", "shift3"], ["scaled"]),
        helper.make_node("Cast", ["votes"], ["votes64"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["votes64", "one"], ["total"], keepdims=0),
        helper.make_node("Add", ["votes", "votes"], ["twice"]),
        helper.make_node("Not", ["on"], ["off"]),
        helper.make_node("Identity", ["words"], ["said"]),
    ]
    constants = {"axes": [1, 2], "axis": [2], "one": [1]}
    weights = [onnx.numpy_helper.from_array(np.array(v, np.int64), name) for name, v in constants.items()]
    function = mixed_signature().functions["mix"]
    graph = helper.make_graph(nodes, "mix", infos(function.inputs), infos(function.outputs), weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def publish_mixed(store: ArtifactStore, folder: Path, *, name: str = "mixed") -> Manifest:
    """The graph of `write_mixed`, which needs no torch."""
    write_mixed(folder / "exports" / "onnx-fp32" / "mix.onnx")
    signature = mixed_signature()
    report = ExportReport(target="onnx-fp32", files=("exports/onnx-fp32/mix.onnx",), **REPORT)
    manifest = Manifest(
        name=name,
        kind="predictor",
        card=Card(functions=signature.functions).model_dump(mode="json"),
        signature=signature,
        exports={"onnx-fp32": report},
    )
    return store.publish(folder, manifest)

"""A torch module as an ONNX file with a dynamic batch, checked by `onnx.checker`."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir
import torch

from distill_core.errors import ArtifactError
from distillery_converter.graphs import EXAMPLE_BATCH, Graph, tensors
from distillery_converter.precision import widen

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}  # convolutions know bfloat16 from 22 on
OPSET = OPSETS["fp32"]
MAX_BATCH = 1024
INLINE_BYTES = 1_500_000_000  # above it weights go to a side file; protobuf's own limit is 2 GiB

CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")

log = logging.getLogger(__name__)


def tool_versions() -> dict[str, str]:
    """Versions of everything that decides the exported file's content."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}


def export(graph: Graph, folder: Path, *, opset: int = OPSET) -> Path:
    """Write `<folder>/<graph.name>.onnx`, with a side file only if the weights exceed 1.5 GB.

    The first axis of every input and of the output is called `batch`; all others are fixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{graph.name}.onnx"
    module = graph.module.eval().requires_grad_(False)
    program = _program(graph, module, opset)
    widen(program.model)
    _strip(program.model)
    program.save(path, external_data=_weight_bytes(module) > INLINE_BYTES)
    _require_dynamic_batch(path)
    onnx.checker.check_model(str(path), full_check=True)
    log.info("exported %s, opset %d, %d bytes", path.name, opset, path.stat().st_size)
    return path


def _strip(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes, e.g. stack traces with local paths."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()


def _require_dynamic_batch(path: Path) -> None:
    """The exporter can bake the example's batch in without a word, e.g. where a network calls `len(x)`."""
    graph = onnx.load(str(path), load_external_data=False).graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim[0].dim_param != "batch":
            raise ArtifactError(
                f"{path.name}: the network fixes the batch of {value.name}, so it cannot be served"
            )


def _program(graph: Graph, module: torch.nn.Module, opset: int) -> torch.onnx.ONNXProgram:
    inputs = graph.inputs(EXAMPLE_BATCH)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own internals; what matters is checked afterwards
        try:
            program = torch.onnx.export(
                module,
                tensors(inputs),
                input_names=list(inputs),
                output_names=[graph.output],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ArtifactError(f"{graph.name} cannot be exported as ONNX: {_reason(error)}") from error
    assert program is not None
    return program


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _weight_bytes(module: torch.nn.Module) -> int:
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)

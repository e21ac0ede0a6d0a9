"""A torch module as an ONNX file with a dynamic batch, checked by `onnx.checker`."""

from __future__ import annotations

import inspect
import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import opset20 as op

from distill_core.errors import ArtifactError
from distillery_converter.graph import EXAMPLE_BATCH, Graph, tensors
from distillery_converter.precision import widen

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}  # convolutions know bfloat16 from 22 on
OPSET = OPSETS["fp32"]
MAX_BATCH = 1024
INLINE_BYTES = 1_500_000_000  # above it weights go to a side file; protobuf's own limit is 2 GiB

TINY = 1e-7  # above what the optimiser takes for 0

CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")

log = logging.getLogger(__name__)


def tool_versions() -> dict[str, str]:
    """Versions of everything that decides the exported file's content."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}


def export(graph: Graph, folder: Path, *, opset: int = OPSET) -> Path:
    """Write `<folder>/<graph.name>.onnx`, with a side file only if the weights exceed 1.5 GB.

    The first axis of every input and output is called `batch`; of the others those are free that `graph.frees` names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{graph.name}.onnx"
    module = graph.module.eval().requires_grad_(False)
    program = _program(graph, module, opset)
    widen(program.model)
    _strip(program.model)
    program.save(path, external_data=_weight_bytes(module) > INLINE_BYTES)
    _require_free_axes(path, graph)
    onnx.checker.check_model(str(path), full_check=True)
    log.info("exported %s, opset %d, %d bytes", path.name, opset, path.stat().st_size)
    return path


def _strip(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes, e.g. stack traces with local paths."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()


def _require_free_axes(path: Path, graph: Graph) -> None:
    """The exporter can bake the example's sizes in without a word, e.g. where a network calls `len(x)`."""
    file = onnx.load(str(path), load_external_data=False).graph
    for value in (*file.input, *file.output):
        axes = value.type.tensor_type.shape.dim
        if not axes or axes[0].dim_param != "batch":
            raise ArtifactError(
                f"{path.name}: the network fixes the batch of {value.name}, so it cannot be served"
            )
        for axis in graph.frees.get(value.name, ()):
            if not axes[axis].dim_param:
                raise ArtifactError(
                    f"{path.name}: the network fixes axis {axis} of {value.name} at {axes[axis].dim_value}, where "
                    "its signature says that any size is taken; say the size there, or mend the network"
                )


def _program(graph: Graph, module: torch.nn.Module, opset: int) -> torch.onnx.ONNXProgram:
    inputs = graph.inputs(EXAMPLE_BATCH)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own internals; what matters is checked afterwards
        try:
            program = torch.onnx.export(
                module,
                tensors(inputs),
                input_names=list(inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=_dynamic_shapes(graph, module),
                opset_version=opset,
                custom_translation_table={torch.ops.aten._cdist_forward.default: _distances},
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            _drop_idle_squeezes(program.model)
            if not _has_tiny_terms(program.model):
                program.optimize()
        except torch.onnx.OnnxExporterError as error:
            raise ArtifactError(f"{graph.name} cannot be exported as ONNX: {_reason(error)}") from error
    return program


def _drop_idle_squeezes(model: onnx_ir.Model) -> None:
    """Take out what squeezes an axis of more than one entry: torch leaves such as it is, and ONNX refuses it."""
    for node in list(model.graph):
        if node.op_type != "Squeeze" or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is not None and after is not None and len(before) == len(after):
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


def _has_tiny_terms(model: onnx_ir.Model) -> bool:
    """Whether it adds constants that the exporter's optimiser would take for 0 and leave out.

    A denominator of linear attention is 0 without its 1e-15, where a picture has but few tokens.
    """
    for node in model.graph:
        for value in node.inputs if node.op_type in ("Add", "Sub") else ():
            constant = None if value is None else onnx_ir.convenience.get_const_tensor(value)
            if constant is not None and constant.size == 1 and 0 < abs(float(constant.numpy())) < TINY:
                return True
    return False


def _distances(x: Any, y: Any, p: float, compute_mode: int | None = None) -> Any:
    """`torch.cdist`, for which the exporter has no words, in its own form for many points."""
    if p != 2:
        raise NotImplementedError(f"only Euclidean distances are exported, not those of p = {p}")
    last: Any = [-1]
    before: Any = [-2]
    product = op.Einsum(x, y, equation="...id,...jd->...ij")
    of_x = op.ReduceSumSquare(x, last, keepdims=1)
    of_y = op.Unsqueeze(op.ReduceSumSquare(y, last, keepdims=0), before)
    return op.Sqrt(op.Relu(op.Sub(op.Add(of_x, of_y), op.Add(product, product))))


def _dynamic_shapes(graph: Graph, module: torch.nn.Module) -> tuple[Any, ...]:
    """The free axes of each input, as the module's arguments take them."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = tuple(
        {0: batch, **{axis: torch.export.Dim.AUTO for axis in graph.frees.get(name, ())}}
        for name in graph.inputs(EXAMPLE_BATCH)
    )
    arguments = inspect.signature(module.forward).parameters.values()
    collected = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in arguments)
    return (shapes,) if collected else shapes


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _weight_bytes(module: torch.nn.Module) -> int:
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)

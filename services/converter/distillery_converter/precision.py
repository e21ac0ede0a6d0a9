"""Networks and graphs in float16 and bfloat16; their inputs and outputs stay float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from distillery_converter.graph import EXAMPLE_BATCH, Graph

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PROMPTS = ("encoder_hidden_states", "pooled_projections")  # what networks are told of them
LAYERS = ("MatMul", "Gemm")  # of a field
MOVES = ("Slice", "Squeeze", "Split", "Transpose", "Reshape", "Gather")  # by which it looks up its tables


def lowered(graph: Graph, precision: str) -> Graph:
    """The graph with its `whole` network in `fp16` or `bf16`; inputs, outputs and preconditioning stay as they are.

    sigma**2 overflows float16. Decoder, encoder and text encoder are left as they are: they run once an image, and
    published decoders overflow it too.
    """
    if graph.whole is None:
        return graph
    dtype = DTYPES[precision]
    module, whole = copy.deepcopy(
        (graph.module, graph.whole)
    )  # in one, so that one stays a part of the other
    nn.Module.to(whole, dtype)  # diffusers' own warns of layers to keep, also where there are none
    if whole is module:
        outputs = [torch.from_numpy(one).dtype for one in graph.predict(graph.inputs(EXAMPLE_BATCH))]
        return replace(graph, module=Lowered(module, dtype, outputs), whole=None)
    whole.register_forward_pre_hook(partial(_given, dtype), with_kwargs=True)
    return replace(graph, module=module, whole=whole)


class Lowered(nn.Module):
    """A module in `dtype` whose inputs and outputs keep their own types."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, outputs: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.module, self.dtype, self.outputs = module, dtype, tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cast = (value.to(self.dtype) if value.is_floating_point() else value for value in inputs)
        result = self.module(*cast)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(one.to(dtype) for one, dtype in zip(outputs, self.outputs, strict=True))


def _given(
    dtype: torch.dtype, _network: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The image and the prompt in `dtype`; the time is embedded in float32 by the network itself."""
    read = {name: kwargs[name].to(dtype) for name in PROMPTS if name in kwargs}
    kwargs = {**kwargs, **read}
    return (args[0].to(dtype), *args[1:]), kwargs


def half_field(source: Path, target: Path) -> None:
    """Write a radiance field's block with its layers and tables in float16.

    Positions, indices into the tables and the weights between their entries stay float32: float16 cannot tell
    neighbouring cells apart.
    """
    model = ir.load(source)
    graph, half = model.graph, ir.DataType.FLOAT16
    weights = {id(value) for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT}
    stored: dict[int, ir.Value] = {}  # what is in float16 and was never computed with
    for node in list(graph):
        if node.op_type in MOVES and (id(node.inputs[0]) in weights or id(node.inputs[0]) in stored):
            stored |= _by_id([node.inputs[0], *node.outputs])
        elif node.op_type in LAYERS:
            own = _by_id([value for value in node.inputs if id(value) in weights])
            stored |= own
            _cast_inputs(graph, node, _outside(own), half)
            _cast_outputs(graph, node, node.outputs, (half, ir.DataType.FLOAT))
    for node in list(graph):
        if node.op_type not in (*LAYERS, *MOVES):
            _cast_inputs(graph, node, lambda value: id(value) in stored, ir.DataType.FLOAT)
    for value in stored.values():
        value.dtype = half
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    ir.save(model, target)


def widen(model: ir.Model) -> None:
    """Compute in float32 what ONNX knows no bfloat16 for, e.g. Einsum: casts before and after such nodes."""
    graph, opset = model.graph, model.graph.opset_imports[""]
    for node in list(graph):
        low = [index for index, value in enumerate(node.inputs) if value is not None and _is_low(value)]
        if node.domain or not low or _takes_bfloat16(node.op_type, opset, low):
            continue
        _cast_inputs(graph, node, _is_low, ir.DataType.FLOAT)
        outputs = [value for value in node.outputs if _is_low(value)]
        _cast_outputs(graph, node, outputs, (ir.DataType.FLOAT, ir.DataType.BFLOAT16))


def _is_low(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.BFLOAT16


def _takes_bfloat16(op_type: str, opset: int, inputs: list[int]) -> bool:
    schema = onnx.defs.get_schema(op_type, opset)
    kinds = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    last = len(schema.inputs) - 1  # a variadic input is the last one
    return all("tensor(bfloat16)" in kinds.get(schema.inputs[min(i, last)].type_str, ()) for i in inputs)


def _outside(known: Container[int]) -> Callable[[ir.Value], bool]:
    return lambda value: id(value) not in known


def _by_id(values: Sequence[ir.Value | None]) -> dict[int, ir.Value]:
    return {id(value): value for value in values if value is not None}


def _cast_inputs(
    graph: ir.Graph, node: ir.Node, which: Callable[[ir.Value], bool], dtype: ir.DataType
) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and which(value):
            cast = _cast(value, dtype)
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def _cast_outputs(
    graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value], dtypes: tuple[ir.DataType, ir.DataType]
) -> None:
    """Say that `node` gives `values` in the first type, and give them to others in the second."""
    for value in values:
        users = list(value.uses())
        value.dtype, cast = dtypes[0], _cast(value, dtypes[1])
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        graph.insert_after(node, cast)
        if value in graph.outputs:  # by the same name
            cast.outputs[0].name, value.name = value.name, f"{value.name}_low"
            graph.outputs[list(graph.outputs).index(value)] = cast.outputs[0]


def _cast(value: Any, dtype: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))])
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node

"""ONNX graphs written anew for ONNX Runtime's CPU provider: the same function, up to rounding, in less time.

Of a nearest upsampling by 2, the three rows that a 3x3 convolution looks at are two rows of x. So the even and the odd
rows of its output are convolutions of two rows each, their weights sums of the three, and a third of the work is gone:

    y[2i]     =  w0       x[i - 1] + (w1 + w2) x[i]
    y[2i + 1] = (w0 + w1) x[i]     +       w2  x[i + 1]

Columns stay upsampled: putting single values in their places takes longer than is saved. A convolution to a picture's
few channels is computed as one to 16 of them; a transposed one is not. A scale and a shift for each channel, as after a
group norm, become one pass over memory instead of two.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

MOST_BYTES = 2**28  # of a file: three times as much more memory is taken while it is rewritten and loaded
RESIZE: dict[str, Any] = {
    "mode": b"nearest",
    "nearest_mode": b"floor",
    "coordinate_transformation_mode": b"asymmetric",
}
NARROW = 4  # channels: of a picture, or its latents
CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "group": 1}


def rewritten(path: Path) -> bytes | None:
    """The model of a file, rewritten; None if there is nothing to rewrite, or weights lie in files of their own.

    Raises:
        Exception: the file is no ONNX model; of what class, `onnx` does not say.
    """
    if path.stat().st_size > MOST_BYTES:
        return None
    model = onnx.load(str(path), load_external_data=False)
    graph = _Graph(model.graph)
    if not model.functions and graph.is_plain and graph.rewrite():
        return bytes(model.SerializeToString())
    return None


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._new: list[onnx.TensorProto] = []
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._given = {value.name for value in graph.input}  # may replace a weight of that name
        values = (*graph.input, *graph.value_info, *graph.output)
        self._shapes = {value.name: _shape(value) for value in values}
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(value.name for value in graph.output)
        self._nodes = [node for node in graph.node if node.domain == ""]  # ONNX's own operators
        self._made_by = {name: node for node in self._nodes for name in node.output}

    @property
    def is_plain(self) -> bool:
        """Whether all that it holds is in it, and no node has a graph of its own, which could use any value."""
        attributes = [attribute for node in self._graph.node for attribute in node.attribute]
        tensors = [
            *self._weights.values(),
            *(tensor for one in attributes for tensor in (one.t, *one.tensors)),
        ]
        inside = all(tensor.data_location != tensor.EXTERNAL for tensor in tensors)
        nested = any(attribute.HasField("g") or attribute.graphs for attribute in attributes)
        return inside and not nested and not self._graph.sparse_initializer

    def rewrite(self) -> int:
        """Number of nodes that were rewritten, here and now, each with what makes its first input."""
        rules = {"Conv": (self._upsampled, self._narrow), "Add": (self._by_channel,)}
        instead: dict[str, list[NodeProto]] = {}  # by the output that nodes make
        for node in self._nodes:
            new = next(filter(None, (rule(node) for rule in rules.get(node.op_type, ()))), None)
            if new:
                instead[node.output[0]] = new
        nodes = [new for node in self._graph.node for new in instead.get(node.output[0], [node])]
        kept, used = [], {value.name for value in self._graph.output}
        for node in reversed(nodes):
            if not used.isdisjoint(node.output):
                kept.append(node)
                used.update(node.input)
        del self._graph.node[:]
        self._graph.node.extend(kept[::-1])
        weights = self._graph.initializer  # not made anew: that would copy them all
        for index in reversed(range(len(weights))):
            if weights[index].name not in used:
                del weights[index]
        weights.extend(self._new)
        return len(instead)

    def _upsampled(self, conv: NodeProto) -> list[NodeProto] | None:
        """In place of a convolution of what was upsampled: the equations above."""
        up, shape = self._made_by.get(conv.input[0]), self._shapes.get(conv.output[0], ())
        if not (up and up.op_type == "Resize" and self._uses[up.output[0]] == 1):
            return None
        if len(shape) != 4 or not shape[3] or not (_has(up, RESIZE) and _has(conv, CONV)):
            return None
        weight, scales = self._constant(conv.input[1]), self._constant(up.input[2])
        if weight is None or scales is None or scales.tolist() != [1, 1, 2, 2]:
            return None
        name = conv.output[0]
        wide, width_only = f"{name}.wide", self._add(f"{name}.scales", np.array([1, 1, 1, 2], np.float32))
        nodes = [helper.make_node("Resize", [up.input[0], "", width_only], [wide], **RESIZE)]
        w0, w1, w2 = np.moveaxis(weight.astype(np.float64), 2, 0)
        for row, (parity, taps) in enumerate({"even": (w0, w1 + w2), "odd": (w0 + w1, w2)}.items()):
            taps_name = self._add(f"{name}.{parity}.weight", np.stack(taps, axis=2).astype(np.float32))
            inputs = [wide, taps_name, *conv.input[2:]]
            pads = [1 - row, 1, row, 1]
            nodes.append(
                helper.make_node("Conv", inputs, [f"{name}.{parity}"], kernel_shape=[2, 3], pads=pads)
            )
        # side by side in memory, an even row and the odd one below it are two rows
        nodes.append(helper.make_node("Concat", [f"{name}.even", f"{name}.odd"], [f"{name}.pairs"], axis=3))
        rows = self._add(f"{name}.shape", np.array([0, 0, -1, shape[3]], np.int64))
        return [*nodes, helper.make_node("Reshape", [f"{name}.pairs", rows], [name])]

    def _narrow(self, conv: NodeProto) -> list[NodeProto] | None:
        """In place of a convolution to few channels, say a picture's: the same as a transposed one."""
        held = self._weights.get(conv.input[1])
        if not held or held.dims[0] > NARROW or not _has(conv, CONV):
            return None
        weight = self._constant(conv.input[1])
        if weight is None:
            return None
        name = conv.output[0]
        flipped = np.ascontiguousarray(weight[:, :, ::-1, ::-1].swapaxes(0, 1))
        inputs = [conv.input[0], self._add(f"{name}.weight", flipped), *conv.input[2:]]
        return [helper.make_node("ConvTranspose", inputs, [name], kernel_shape=[3, 3], pads=CONV["pads"])]

    def _by_channel(self, add: NodeProto) -> list[NodeProto] | None:
        """In place of a shift by channel, of what is scaled by channel: a batch norm without a batch."""
        mul, name = self._made_by.get(add.input[0]), add.output[0]
        if not (mul and mul.op_type == "Mul" and self._uses[mul.output[0]] == 1):
            return None
        scale, shift = self._constant(mul.input[1]), self._constant(add.input[1])
        shape = self._shapes.get(name, ())
        by_channel = len(shape) == 4 and shape[1] > 1 and (shape[1], 1, 1)
        if scale is None or shift is None or not scale.shape == shift.shape == by_channel:
            return None
        if self._channels(mul.input[0]) != shape[1]:  # one channel may be scaled to many
            return None
        zeros = np.zeros(shape[1], np.float32)
        constants = {"scale": scale.ravel(), "shift": shift.ravel(), "mean": zeros, "variance": zeros + 1}
        inputs = [self._add(f"{name}.{kind}", value) for kind, value in constants.items()]
        return [helper.make_node("BatchNormalization", [mul.input[0], *inputs], [name], epsilon=0.0)]

    def _channels(self, name: str) -> int:
        """C of a value (N, C, H, W); 0: not known. What is given another value's shape has as many."""
        reshape = self._made_by.get(name)
        shape = self._made_by.get(reshape.input[1]) if reshape and reshape.op_type == "Reshape" else None
        if shape and shape.op_type == "Shape" and not any(attribute.i for attribute in shape.attribute):
            name = shape.input[0]
        known = self._shapes.get(name, ())
        return known[1] if len(known) == 4 else 0

    def _constant(self, name: str) -> np.ndarray | None:
        tensor = None if name in self._given else self._weights.get(name)
        return numpy_helper.to_array(tensor) if tensor and tensor.data_type == tensor.FLOAT else None

    def _add(self, name: str, value: np.ndarray) -> str:
        self._new.append(numpy_helper.from_array(value, name))
        return name


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """0 where the length is not fixed."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _has(node: NodeProto, wanted: dict[str, Any]) -> bool:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return all(attributes.get(name) == value for name, value in wanted.items())

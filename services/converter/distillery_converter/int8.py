"""Graphs in int8: static QDQ by ONNX Runtime, calibrated on the sampler's own noise levels and noise.

Convolutions and products with weights run on 8-bit integers, weights with a scale per channel; all else stays
float32. Weights use 7 of their 8 bits: processors without VNNI instructions add two products of 8 bits in 16 and
saturate, and the answer must not depend on the processor.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from distill_core.errors import ArtifactError
from distillery_converter.calibration import COUNT
from distillery_converter.graph import Graph

CALIBRATION = "1"  # counts up when anything here changes what is written
CALIBRATION_ITEMS = 128  # inputs that activations' ranges are read from, at least
FIRST_SEED = 20_260_200  # of the calibration's trajectories; later ones count on
OPS = ("Conv", "MatMul", "Gemm")  # with every op ONNX Runtime refuses weights that two kinds of layer share

log = logging.getLogger(__name__)


def quantise(graph: Graph, source: Path, target: Path) -> str:
    """Write the float32 ONNX file `source` of `graph` to `target` in int8; what of it was left in float32, in words.

    Raises:
        ArtifactError: ONNX Runtime cannot quantise the graph; it says why.
    """
    with tempfile.TemporaryDirectory(prefix="int8-", dir=target.parent) as scratch:
        try:
            return _quantise(graph, source, target, Path(scratch))
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"{graph.name} cannot be quantised: {reason}") from error


def _quantise(graph: Graph, source: Path, target: Path, scratch: Path) -> str:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, side = scratch / source.name, f"{source.name}.data"
    external = source.with_name(side).exists()  # more than protobuf can hold in one file
    quant_pre_process(
        str(source),
        str(prepared),
        skip_symbolic_shape=True,
        skip_optimization=external,  # its result is held in one message
        save_as_external_data=external,
        all_tensors_to_one_file=external,
        external_data_location=side if external else None,
    )
    first = _input_layer(graph, prepared)
    quantize_static(
        str(prepared),
        str(target),
        _reader(graph),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(OPS),
        nodes_to_exclude=first,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        use_external_data_format=external,
        extra_options={
            "MatMulConstBOnly": True,  # attention's products of two activations stay float32
            "OpTypesToExcludeOutputQuantization": [
                "MatMul",
                "Gemm",
            ],  # their sums leave in float32: 1 to 3 dB
        },
    )
    written = onnx.load(str(target), load_external_data=False).graph.node
    if not any(node.op_type == "DequantizeLinear" for node in written):
        raise ValueError("it has neither convolutions nor products with weights in float32")
    left = [f"input layer ({', '.join(first)})"] if first else []
    return "; ".join([*left, "all but convolutions and products with weights"])


def _input_layer(graph: Graph, prepared: Path) -> list[str]:
    """Names of the nodes that read a denoiser's noisy image: its range is the widest of all, and it costs little."""
    if graph.trajectory is None:
        return []
    nodes = onnx.load(str(prepared), load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type == "Conv"][:1]


def _reader(graph: Graph) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    feeds = calibration_feeds(graph)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    return Reader()


def calibration_feeds(graph: Graph) -> Iterator[dict[str, Any]]:
    """Inputs as serving feeds them, whole trajectories from noise to picture until there are `CALIBRATION_ITEMS`."""
    items, seed = 0, FIRST_SEED
    while items < CALIBRATION_ITEMS:
        for feed in graph.feeds(seed):
            items += COUNT
            yield feed
        seed += 1

"""KServe v2 tensors to NumPy and back."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tritonclient.grpc import service_pb2

from distill_core.errors import ConfigError

DTYPES = {
    "UINT64": "<u8",
    "INT64": "<i8",
    "INT32": "<i4",
    "UINT8": "u1",
    "BOOL": "?",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
FLOATS = ("FP16", "FP64")  # taken where FP32 is wanted
_TYPED = {
    "UINT64": "uint64_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "BOOL": "bool_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as the protocol describes it; -1 is any size, the first axis the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    accepts: tuple[str, ...] = ()  # datatypes that are converted to its own


def read_inputs(
    request: service_pb2.ModelInferRequest, specs: Mapping[str, TensorSpec]
) -> dict[str, np.ndarray]:
    """The request's tensors by name, each checked against its spec; BYTES are arrays of objects (str).

    Raises:
        ConfigError: an unknown or missing input, a wrong type, shape or length.
    """
    raw = request.raw_input_contents
    for tensor in request.inputs:  # before they are counted: an input in shared memory has no content
        if tensor.parameters:
            raise ConfigError(
                f"input {tensor.name!r} has the parameters {', '.join(sorted(tensor.parameters))}; there is no "
                "shared memory here, send the tensor in the message",
                field=f"inputs.{tensor.name}",
            )
    if raw and len(raw) != len(request.inputs):
        raise ConfigError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs", field="inputs")
    arrays = {}
    for index, tensor in enumerate(request.inputs):
        spec = specs.get(tensor.name)
        if spec is None:
            known = ", ".join(specs)
            raise ConfigError(
                f"input {tensor.name!r} is not known; known: {known}", field=f"inputs.{tensor.name}"
            )
        if tensor.name in arrays:
            raise ConfigError(f"input {tensor.name!r} is given twice", field=f"inputs.{tensor.name}")
        arrays[tensor.name] = _read(tensor, raw[index] if raw else None, spec)
    missing = [name for name, spec in specs.items() if not spec.optional and name not in arrays]
    if missing:
        raise ConfigError(f"input {missing[0]!r} is missing", field=f"inputs.{missing[0]}")
    return arrays


def _read(
    tensor: service_pb2.ModelInferRequest.InferInputTensor, raw: bytes | None, spec: TensorSpec
) -> np.ndarray:
    field, shape = f"inputs.{tensor.name}", tuple(tensor.shape)
    fits = len(shape) == len(spec.shape) and all(w in (-1, g) for g, w in zip(shape, spec.shape, strict=True))
    if tensor.datatype not in (spec.datatype, *spec.accepts) or not fits or min(shape, default=0) < 1:
        raise ConfigError(
            f"input {tensor.name} is {tensor.datatype} {list(shape)}; "
            f"wanted is {spec.datatype} {list(spec.shape)}",
            field=field,
        )
    values = _values(tensor, raw, field)
    count = int(np.prod(shape, dtype=object))
    if len(values) != count:
        raise ConfigError(
            f"input {tensor.name} holds {len(values)} values, its shape says {count}", field=field
        )
    if spec.datatype != "BYTES":
        values = values.astype(DTYPES[spec.datatype], copy=False)
    return values.reshape(shape)


def _values(
    tensor: service_pb2.ModelInferRequest.InferInputTensor, raw: bytes | None, field: str
) -> np.ndarray:
    if raw is not None and tensor.HasField("contents"):
        raise ConfigError(
            f"input {tensor.name} is in raw_input_contents and in contents; send one of them", field=field
        )
    if tensor.datatype == "BYTES":
        parts = list(tensor.contents.bytes_contents) if raw is None else _strings(raw, field)
        try:
            return np.array([part.decode() for part in parts], dtype=object)
        except UnicodeDecodeError:
            raise ConfigError(f"input {tensor.name} is not UTF-8 text", field=field) from None
    if raw is None and tensor.datatype not in _TYPED:
        raise ConfigError(
            f"input {tensor.name} is {tensor.datatype}, which goes in raw_input_contents only", field=field
        )
    if raw is None:
        values: np.ndarray = np.array(
            getattr(tensor.contents, _TYPED[tensor.datatype]), dtype=DTYPES[tensor.datatype]
        )
        return values
    dtype = np.dtype(DTYPES[tensor.datatype])
    if len(raw) % dtype.itemsize:
        raise ConfigError(
            f"input {tensor.name} has {len(raw)} bytes, no multiple of {dtype.itemsize}", field=field
        )
    if tensor.datatype == "BOOL":
        bits: np.ndarray = np.frombuffer(raw, dtype=np.uint8) != 0
        return bits
    return np.frombuffer(raw, dtype=dtype)


def _strings(raw: bytes, field: str) -> list[bytes]:
    parts, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise ConfigError("a BYTES tensor ends within a length", field=field)
        (length,) = struct.unpack_from("<I", raw, at)
        parts.append(raw[at + 4 : at + 4 + length])
        if len(parts[-1]) != length:
            raise ConfigError("a BYTES tensor ends within a text", field=field)
        at += 4 + length
    return parts


def write_outputs(
    response: service_pb2.ModelInferResponse, values: Mapping[str, tuple[str, np.ndarray]]
) -> None:
    """Add tensors (name -> datatype, array) to a reply, as raw contents."""
    for name, (datatype, array) in values.items():
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(_bytes(datatype, array))


def _bytes(datatype: str, array: np.ndarray) -> bytes:
    if datatype != "BYTES":
        return np.ascontiguousarray(array, dtype=DTYPES[datatype]).tobytes()
    texts = [text.encode() for text in array.ravel().tolist()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)

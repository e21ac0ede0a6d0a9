"""Parts that the sampler and its clients both read and write inside `distillery.v1` messages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distill_core.errors import ConfigError
from distillery.v1 import common_pb2
from distillery_sampler.engine.image_formats import Format

FORMATS: dict[int, Format] = {
    common_pb2.IMAGE_FORMAT_UNSPECIFIED: "PNG",
    common_pb2.IMAGE_FORMAT_RAW_U8: "RAW_U8",
    common_pb2.IMAGE_FORMAT_PNG: "PNG",
    common_pb2.IMAGE_FORMAT_JPEG: "JPEG",
    common_pb2.IMAGE_FORMAT_WEBP: "WEBP",
}


def tensor_to(values: np.ndarray) -> common_pb2.FloatTensor:
    """A float array as a message."""
    return common_pb2.FloatTensor(
        shape=values.shape, data=np.ascontiguousarray(values, dtype="<f4").tobytes()
    )


def tensor_from(message: common_pb2.FloatTensor) -> np.ndarray:
    """A message as a float array."""
    return np.frombuffer(message.data, dtype="<f4").reshape(tuple(message.shape))


NUMBERS = (
    "float16",
    "float32",
    "float64",
    "int32",
    "int64",
    "uint8",
    "bool",
)  # values of `dtype`, beside text


def array_to(values: Any, name: str = "the array") -> common_pb2.Tensor:
    """An array of numbers or texts as a message.

    Raises:
        ConfigError: values of a type that no message holds.
    """
    array = np.asarray(values)
    if array.dtype.kind in "USO":
        return common_pb2.Tensor(dtype="text", shape=array.shape, texts=_texts(array, name))
    if array.dtype.name not in NUMBERS:
        raise ConfigError(
            f"{name} holds {array.dtype} values, which cannot be sent; allowed are {', '.join(NUMBERS)} and texts",
            field=name,
        )
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return common_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, data=data)


def array_from(message: common_pb2.Tensor, name: str = "the array") -> np.ndarray:
    """A message as an array; texts as an array of objects (str).

    Raises:
        ConfigError: an unknown type, or another number of values than the shape says.
    """
    shape, count = tuple(message.shape), math.prod(message.shape)
    if message.dtype == "text":
        held = len(message.texts)
    elif message.dtype in NUMBERS:
        dtype = np.dtype(message.dtype).newbyteorder("<")
        held, left = divmod(len(message.data), dtype.itemsize)
        count = -1 if left else count
    else:
        raise ConfigError(
            f"{name} has the dtype {message.dtype!r}; allowed are {', '.join(NUMBERS)} and text", field=name
        )
    if min(shape, default=0) < 0 or held != count or (message.texts and message.data):
        raise ConfigError(
            f"{name} holds {len(message.texts) or len(message.data)} {'texts' if message.texts else 'bytes'}, "
            f"which is not {message.dtype} of shape {list(shape)}",
            field=name,
        )
    if message.dtype == "text":
        return np.array(list(message.texts), dtype=object).reshape(shape)
    if message.dtype == "bool":
        bits: np.ndarray = np.frombuffer(message.data, np.uint8) != 0
        return bits.reshape(shape)
    return np.frombuffer(message.data, dtype).reshape(shape)


def _texts(array: np.ndarray, name: str) -> list[str]:
    texts = array.ravel().tolist()
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(
                f"{name} holds {text!r}, which cannot be sent; give numbers or texts", field=name
            )
    return texts

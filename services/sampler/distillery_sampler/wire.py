"""What the sampler and its clients both read and write inside `distillery.v1` messages."""

from __future__ import annotations

import numpy as np

from distillery.v1 import common_pb2
from distillery_sampler.images import Format

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

"""Functions as KServe v2 has them: `MODEL:FUNCTION` is a model; the bare name is that of the first function.

Tensors are those of the signature with the batch first; an item that is a single value, or a text, is [B,1].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_core import signature
from distill_core.artifacts import Manifest
from distillery_sampler.kserve.tensors import FLOATS, TensorSpec

DATATYPES = {
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "bool": "BOOL",
    "text": "BYTES",
}
ACCEPTS = {"float32": FLOATS, "float64": ("FP16", "FP32")}


def split_name(name: str) -> tuple[str, str]:
    """Model and function of a name; "" is the model's first function."""
    model, _, function = name.partition(":")
    return model, function


def served_name(model: str, function: str) -> str:
    """The name of a function, or of the model itself."""
    return f"{model}:{function}" if function else model


def listed_functions(manifest: Manifest) -> list[str]:
    """Functions that are listed beside the model itself, "": all but the first."""
    return ["", *list(manifest.signature.functions)[1:]]


def tensor_specs(tensors: Mapping[str, signature.TensorSpec]) -> dict[str, TensorSpec]:
    """The protocol's description of inputs or outputs."""
    return {
        name: TensorSpec(
            name,
            DATATYPES[spec.dtype],
            (-1, *(spec.shape or (1,))),
            optional=spec.optional,
            accepts=ACCEPTS.get(spec.dtype, ()),
        )
        for name, spec in tensors.items()
    }


def from_protocol(
    tensors: Mapping[str, signature.TensorSpec], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays as the signature has them."""
    return {
        name: values if tensors[name].shape else values.reshape(len(values))
        for name, values in arrays.items()
    }


def to_protocol(
    tensors: Mapping[str, signature.TensorSpec], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays as the protocol has them."""
    return {
        name: values if tensors[name].shape else values.reshape(len(values), 1)
        for name, values in arrays.items()
    }

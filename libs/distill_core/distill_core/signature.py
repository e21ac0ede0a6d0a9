"""Signature of a model: named functions, each with named inputs and outputs. Imports no torch.

A server checks requests against it and batches what fits together; a converter names the inputs of its graphs by it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from distill_core.config import Config
from distill_core.errors import ConfigError, nearest

DType = Literal["float16", "float32", "float64", "int32", "int64", "uint8", "bool", "text"]
# a method of a network, a file of an export, and what follows MODEL: where a server is asked
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,62}$")]
MAX_SIDE = 2**24  # values along one axis
MAX_VALUES = 2**28  # of one item, 1 GiB of float32: above it a size is a mistake, or damage


class TensorSpec(Config):
    """A column of data, an input or an output: its type, and its shape without the batch."""

    dtype: DType
    shape: tuple[int, ...] = ()  # (3, 32, 32), (), …; -1: any size up to that axis of `max_shape`
    low: float | None = None  # least and largest value that is allowed
    high: float | None = None
    max_shape: tuple[int, ...] | None = None  # bounds of the axes that are -1; the others repeat `shape`
    multiple_of: int = Field(1, ge=1)  # what a free axis is divisible by
    optional: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if any(size != -1 and not 0 <= size <= MAX_SIDE for size in self.shape):
            raise ValueError(f"shape {self.shape}: a size is -1 or in 0 to {MAX_SIDE}")
        bounds = self.max_shape or self.shape
        if len(bounds) != len(self.shape) or any(not 0 <= size <= MAX_SIDE for size in bounds):
            raise ValueError(
                f"shape {self.shape} has free sizes; max_shape must bound each of its {len(self.shape)} axes"
            )
        if any(size not in (-1, bound) for size, bound in zip(self.shape, bounds)):
            raise ValueError(f"max_shape {self.max_shape} contradicts shape {self.shape}")
        if math.prod(bounds) > MAX_VALUES:
            raise ValueError(
                f"an item of shape {bounds} has more than the {MAX_VALUES} values that are allowed"
            )
        if any(size == -1 and bound < self.multiple_of for size, bound in zip(self.shape, bounds)):
            raise ValueError(f"max_shape {bounds} leaves no multiple of {self.multiple_of} for a free size")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low = {self.low:g} is above high = {self.high:g}, so no value is allowed")
        return self

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an item of this shape is allowed."""
        if len(shape) != len(self.shape):
            return False
        bounds = self.max_shape or self.shape
        return all(
            length == size or (size == -1 and 1 <= length <= bound and length % self.multiple_of == 0)
            for length, size, bound in zip(shape, self.shape, bounds)
        )

    def checked(self, name: str, values: np.ndarray) -> np.ndarray:
        """`values` (B, …) in this type, if every item fits.

        Raises:
            ConfigError: another kind of number, another shape, NaN, or a value out of range; names `name`.
        """
        if values.ndim == 0:
            raise ConfigError(
                f"{name} is a single value; give an array of items, each {self.described}", field=name
            )
        if self.dtype == "text":
            return _texts(name, values)
        if not self.fits(tuple(values.shape[1:])):
            raise ConfigError(
                f"{name} has items of shape {tuple(values.shape[1:])}, the model takes {self.described}",
                field=name,
            )
        if values.dtype.kind not in _ACCEPTED[np.dtype(self.dtype).kind]:
            raise ConfigError(f"{name} holds {values.dtype} values, the model takes {self.dtype}", field=name)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ConfigError(f"{name} holds NaN or infinity", field=name)
        self._check_range(name, values)
        return self._cast(name, values)

    def _cast(self, name: str, values: np.ndarray) -> np.ndarray:
        """`values` in this type; what it cannot hold is refused, where NumPy would wrap it around."""
        dtype = np.dtype(self.dtype)
        if dtype.kind in "iu" and values.size:
            limits = np.iinfo(dtype)
            holds = limits.min <= int(values.min()) and int(values.max()) <= limits.max
        else:
            with np.errstate(over="ignore"):
                holds = dtype.kind != "f" or bool(np.isfinite(values.astype(dtype, copy=False)).all())
        if not holds:
            raise ConfigError(
                f"{name} holds values from {values.min():g} to {values.max():g}, beyond {self.dtype}",
                field=name,
            )
        return values.astype(dtype, copy=False)

    def _check_range(self, name: str, values: np.ndarray) -> None:
        low, high = self.low, self.high
        if values.size and (
            (low is not None and values.min() < low) or (high is not None and values.max() > high)
        ):
            shown = f"{'-inf' if low is None else f'{low:g}'} to {'inf' if high is None else f'{high:g}'}"
            raise ConfigError(
                f"{name} holds values from {values.min():g} to {values.max():g}; allowed are {shown}",
                field=name,
            )

    @property
    def described(self) -> str:
        """Type and shape in words, as `float32 (3, 32, 32)` or `float32 (1, <=4096)`."""
        bounds = self.max_shape or self.shape
        sizes = (str(size) if size != -1 else f"<={bound}" for size, bound in zip(self.shape, bounds))
        return f"{self.dtype} ({', '.join(sizes)})"


_ACCEPTED = {"f": "fiu", "i": "iu", "u": "u", "b": "b"}  # kinds of numbers by the kind that is wanted


def _texts(name: str, values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    if values.ndim != 1 and values.size != len(values):
        raise ConfigError(f"{name} has the shape {values.shape}; give one text an item", field=name)
    other = [value for value in flat.tolist() if not isinstance(value, str | bytes)]
    if other:
        raise ConfigError(f"{name} holds {other[0]!r}, the model takes texts", field=name)
    try:
        texts = [value.decode("utf-8") if isinstance(value, bytes) else value for value in flat.tolist()]
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text", field=name) from None
    return np.array(texts, dtype=object)


class Function(Config):
    """One function of a model: tensors in, tensors out, by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    batched: bool = True  # whether requests may share a call; False: each is a call of its own

    def checked(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of one request (B, …), all as they should be; optional ones may be absent.

        Raises:
            ConfigError: an unknown or missing input, another number of items, or what `TensorSpec.checked` says.
        """
        for name in arrays:
            if name not in self.inputs:
                raise ConfigError(f"the model has no input {name!r}{nearest(name, self.inputs)}", field=name)
        for name, spec in self.inputs.items():
            if name not in arrays and not spec.optional:
                raise ConfigError(f"input {name} is missing: {spec.described}", field=name)
        checked = {name: self.inputs[name].checked(name, values) for name, values in arrays.items()}
        counts = {name: len(values) for name, values in checked.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            shown = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
            raise ConfigError(f"inputs need equally many items, at least one; given are {shown}")
        return checked


class Signature(Config):
    """Functions of a model by name; the first is the one that a model's bare name calls."""

    functions: dict[FunctionName, Function] = {}

    @property
    def default(self) -> str | None:
        """The function that a model's bare name calls; None for what is not called."""
        return next(iter(self.functions), None)

    def function(self, name: str = "") -> Function:
        """The function `name`, or the default one.

        Raises:
            ConfigError: the model has no such function.
        """
        name = name or self.default or ""
        if name not in self.functions:
            raise ConfigError(
                f"the model has no function {name!r}{nearest(name, self.functions)}", field="function"
            )
        return self.functions[name]


def described(signature: Signature) -> list[dict[str, Any]]:
    """The functions of a signature as rows of words, for people."""
    return [
        {
            "function": name,
            "inputs": {key: spec.described for key, spec in function.inputs.items()},
            "outputs": {key: spec.described for key, spec in function.outputs.items()},
        }
        for name, function in signature.functions.items()
    ]

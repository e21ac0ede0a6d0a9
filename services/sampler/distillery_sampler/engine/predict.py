"""Calls of functions: a request is checked against the model's signature, cut into items, and put together again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_core.artifacts import Manifest
from distill_core.errors import ConfigError
from distill_core.signature import Function, Signature, TensorSpec
from distillery_sampler.backends.base import Functions, stacked
from distillery_sampler.engine.checks import check_reply
from distillery_sampler.engine.requests import CallKey, PredictRequest
from distillery_sampler.settings import SamplerSettings

QUICK_VALUES = 2**17  # of a request that is checked where it is, in less than a millisecond
_numbers = itertools.count(1)  # of calls that share no batch


@dataclass(frozen=True, eq=False)
class Calls:
    """Items that one request puts into its model's queue."""

    key: CallKey
    payloads: list[dict[str, np.ndarray]]  # items without batch axis, or one call with it
    count: int  # items

    def joined(self, answers: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The outputs (B, …) of all items.

        Raises:
            ConfigError: outputs of free size differ between the items, and make no array.
        """
        if self.key.alone:
            return dict(answers[0])
        try:
            return {name: stacked([answer[name] for answer in answers]) for name in answers[0]}
        except ValueError:
            raise ConfigError(
                "the items have outputs of different sizes, which make no array; send one item a request"
            ) from None


def calls_of(request: PredictRequest, manifest: Manifest, limits: SamplerSettings) -> Calls:
    """The calls that a request makes.

    Raises:
        ConfigError: no such function, inputs that it does not take, or more than `limits` allow.
    """
    name = request.function or manifest.signature.default or ""
    function = manifest.signature.function(name)
    inputs = _checked(function, request.inputs)
    count = len(next(iter(inputs.values())))
    _check_limits(function, inputs, count, limits)
    shapes = tuple((key, values.shape[1:]) for key, values in sorted(inputs.items()))
    if not function.batched:
        return Calls(CallKey(name, shapes, next(_numbers)), [inputs], count)
    items = [{key: values[row] for key, values in inputs.items()} for row in range(count)]
    return Calls(CallKey(name, shapes), items, count)


def _checked(function: Function, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        return function.checked(dict(given))
    except ConfigError as error:
        raise ConfigError(str(error), field=f"inputs.{error.field}" if error.field else "inputs") from None


def _check_limits(
    function: Function, inputs: Mapping[str, np.ndarray], count: int, limits: SamplerSettings
) -> None:
    field = f"inputs.{next(iter(inputs))}"
    if count > limits.max_images:
        raise ConfigError(
            f"{count} items in one request are too many; allowed are {limits.max_images}, send several",
            field=field,
        )
    for name, values in inputs.items():
        longest = max(map(len, values)) if values.dtype == object else 0
        if longest > limits.max_prompt_chars:
            raise ConfigError(
                f"{name} holds a text of {longest} characters; allowed are {limits.max_prompt_chars}",
                field=f"inputs.{name}",
            )
    check_reply(count, output_bytes(function), limits, field=field, stream="smaller requests")


def output_bytes(function: Function) -> int:
    """Bytes that an item's outputs take at least: those of free size, and texts, are counted when they are made."""
    return sum(
        math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in function.outputs.values()
        if spec.dtype != "text" and -1 not in spec.shape
    )


def reply_bytes(outputs: Mapping[str, np.ndarray]) -> int:
    """Bytes of an answer's tensors."""
    return sum(
        sum(len(text.encode()) for text in values.ravel().tolist())
        if values.dtype == object
        else values.nbytes
        for values in outputs.values()
    )


def size_of(inputs: Mapping[str, np.ndarray]) -> int:
    """Values in a request."""
    return sum(np.size(values) for values in inputs.values())


def cost_by(signature: Signature) -> Callable[[CallKey, Any], float]:
    """Cost of an item: its share of the largest that its function takes; 1 where all are of one size."""
    largest = {
        name: max(1, sum(_largest(spec) for spec in function.inputs.values()))
        for name, function in signature.functions.items()
    }

    def cost(key: CallKey, payload: Mapping[str, np.ndarray]) -> float:
        free = any(-1 in spec.shape for spec in signature.functions[key.function].inputs.values())
        items = len(next(iter(payload.values()))) if key.alone else 1
        if not free:
            return float(items)
        values = sum(math.prod(shape) for _, shape in key.shapes)
        return items * max(1, values) / largest[key.function]

    return cost


def _largest(spec: TensorSpec) -> int:
    return math.prod(spec.max_shape or spec.shape)


def runner(backend: Functions) -> Callable[[CallKey, list[Any]], list[dict[str, np.ndarray]]]:
    """Function that the model's threads run a batch with."""

    def run(key: CallKey, payloads: list[Any]) -> list[dict[str, np.ndarray]]:
        if key.alone:
            return [backend.run(key.function, payload) for payload in payloads]
        return backend.call(key.function, payloads)

    return run

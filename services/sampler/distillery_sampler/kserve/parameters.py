"""Parameters of KServe v2 requests, and the guidance and the terms that follow from them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from tritonclient.grpc import service_pb2

from distill_core.artifacts import Manifest
from distill_core.errors import ConfigError, nearest
from distill_core.kinds.cards import served_by
from distillery_sampler.engine.requests import Call
from distillery_sampler.kserve.models import PRIORITIES

OF_ALL = ("priority", "timeout")
OF_KINDS = {  # by how a model is served
    "generate": ("num_steps", "guidance", "negative_scale"),
    "render": ("width", "height"),
}


def read_parameters(request: service_pb2.ModelInferRequest, manifest: Manifest) -> dict[str, float]:
    """The request's parameters, all of them numbers; what Triton's own clients add for Triton is passed over."""
    known = (*OF_ALL, *OF_KINDS.get(served_by(manifest), ()))
    values: dict[str, float] = {}
    for name, given in request.parameters.items():
        if name.startswith("triton_"):
            continue
        if name not in known:
            raise ConfigError(
                f"parameter {name!r} is not known{nearest(name, known)}", field=f"parameters.{name}"
            )
        value = getattr(given, given.WhichOneof("parameter_choice") or "int64_param")
        whole = name not in ("guidance", "negative_scale")
        if isinstance(value, bool | str) or (whole and not float(value).is_integer()):
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"parameter {name} = {value!r} is not {kind}", field=f"parameters.{name}")
        values[name] = value
    return values


def whole(parameters: Mapping[str, float], name: str) -> int | None:
    """A parameter that counts something; None if it is not given."""
    return int(parameters[name]) if name in parameters else None


def pictures_of(inputs: Mapping[str, np.ndarray]) -> int:
    """Number of pictures that are asked for: the batch of the inputs that are given; without any it is one."""
    return next((len(value) for name, value in inputs.items() if name != "guidance_scale"), 1)


def guidance_of(
    inputs: Mapping[str, np.ndarray], parameters: Mapping[str, float], pictures: int
) -> float | None:
    """From the parameter `guidance` or the input `guidance_scale`."""
    scales = inputs.get("guidance_scale")
    if scales is None:
        return parameters.get("guidance")
    if "guidance" in parameters:
        raise ConfigError(
            "guidance is given as input guidance_scale and as parameter; give one",
            field="parameters.guidance",
        )
    if len(scales) != pictures or (scales != scales[0]).any():
        raise ConfigError(
            "guidance_scale must hold one value for each picture, and these must be equal; send several requests",
            field="inputs.guidance_scale",
        )
    return float(scales[0, 0])


def with_terms(call: Call, parameters: Mapping[str, float]) -> Call:
    """Triton's `priority` and `timeout`."""
    for name in OF_ALL:
        if parameters.get(name, 0) < 0:
            raise ConfigError(
                f"parameter {name} = {parameters[name]} is not allowed: give 0 or more",
                field=f"parameters.{name}",
            )
    timeout = parameters.get("timeout", 0)
    if timeout:
        until = asyncio.get_running_loop().time() + timeout / 1e6
        call = replace(call, deadline=until if call.deadline is None else min(until, call.deadline))
    return replace(call, bulk=parameters.get("priority", 0) >= PRIORITIES)

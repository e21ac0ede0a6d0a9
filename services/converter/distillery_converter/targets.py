"""What a model can be converted to, and how closely each form must agree with PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from distill_core.errors import ConfigError


class Target(NamedTuple):
    """A form of the model, and its gates: the largest absolute and the relative L2 difference allowed."""

    name: str
    runtime: Literal["onnx", "tensorrt"]
    precision: Literal["fp32", "fp16"]
    max_abs: float  # in units of x0, for outputs within [-1, 1]; see parity.Parity.scaled_max_abs
    rel_l2: float


TARGETS = {
    target.name: target
    for target in (
        Target("onnx-fp32", "onnx", "fp32", max_abs=1e-3, rel_l2=1e-4),
        Target("onnx-fp16", "onnx", "fp16", max_abs=5e-2, rel_l2=1e-2),
        Target("trt-fp32", "tensorrt", "fp32", max_abs=1e-2, rel_l2=1e-3),  # TF32 matrix products
        Target("trt-fp16", "tensorrt", "fp16", max_abs=5e-2, rel_l2=1e-2),
    )
}


def find_target(name: str, *, tolerance: float | None = None) -> Target:
    """The target called `name`, its absolute gate replaced by `tolerance` if one is given.

    Raises:
        ConfigError: an unknown target, or a tolerance that is not a number from 0 on.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}; known targets are {', '.join(TARGETS)}", field="target")
    if tolerance is None:
        return TARGETS[name]
    if not 0 <= tolerance < float("inf"):
        message = (
            f"tolerance = {tolerance} is not allowed: give a number from 0 on, e.g. {TARGETS[name].max_abs:g}"
        )
        raise ConfigError(message, field="tolerance")
    return TARGETS[name]._replace(max_abs=float(tolerance))

"""Targets that a model can be converted to, and how closely each must agree with PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from distill_core.errors import ConfigError

FRECHET_RATIO = 1.05  # the Fréchet distance of converted samples over that of PyTorch's own, at most


class Target(NamedTuple):
    """What graphs are written as, and its gates: the largest absolute and the relative L2 difference allowed."""

    name: str
    runtime: Literal["onnx", "tensorrt"]
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    max_abs: float  # in units of x0, for outputs within [-1, 1]; see parity.Parity.scaled_max_abs
    rel_l2: float
    frechet_ratio: float | None = None  # None: not measured

    @property
    def lossy(self) -> bool:
        """Whether the precision is below float32's, so that samples are compared too."""
        return self.frechet_ratio is not None


TARGETS = {
    target.name: target
    for target in (
        Target("onnx-fp32", "onnx", "fp32", max_abs=1e-3, rel_l2=1e-4),
        Target("onnx-fp16", "onnx", "fp16", max_abs=5e-2, rel_l2=1e-2, frechet_ratio=FRECHET_RATIO),
        # 0.0562 is a signal-to-noise ratio of 25 dB; single values may be off by as much as they are large
        Target("onnx-int8", "onnx", "int8", max_abs=1.0, rel_l2=0.0562, frechet_ratio=FRECHET_RATIO),
        Target("trt-fp32", "tensorrt", "fp32", max_abs=1e-2, rel_l2=1e-3),  # TF32 matrix products
        Target("trt-fp16", "tensorrt", "fp16", max_abs=5e-2, rel_l2=1e-2, frechet_ratio=FRECHET_RATIO),
        # bfloat16 has three bits of mantissa fewer than float16: eight times its rounding
        Target("trt-bf16", "tensorrt", "bf16", max_abs=2e-1, rel_l2=4e-2, frechet_ratio=FRECHET_RATIO),
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

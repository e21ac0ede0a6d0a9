"""Does a converted graph compute what PyTorch computes? Measured on fixed inputs, and gated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill_core.errors import ArtifactError
from distillery_converter.graphs import Arrays, Graph, tensors
from distillery_converter.targets import Target

BATCHES = (1, 3, 16)  # 1 and 3 reveal a batch that was baked in; 16 is the largest that is compared
Run = Callable[[Arrays], np.ndarray]


@dataclass(frozen=True)
class Parity:
    """The worst differences from PyTorch, over all compared batches."""

    max_abs: float
    scaled_max_abs: (
        float  # max_abs over max(1, largest |output|): float32 error grows with the numbers themselves
    )
    rel_l2: float

    def worst(self, other: Parity) -> Parity:
        return Parity(
            max(self.max_abs, other.max_abs),
            max(self.scaled_max_abs, other.scaled_max_abs),
            max(self.rel_l2, other.rel_l2),
        )


def compare(graph: Graph, run: Run, batches: Iterable[int] = BATCHES) -> Parity:
    """`run` against the graph's own module on its fixed inputs.

    Raises:
        ArtifactError: an output of another shape, or one that is not finite.
    """
    parity = Parity(0.0, 0.0, 0.0)
    for batch in batches:
        inputs = graph.inputs(batch)
        with torch.inference_mode():
            expected = graph.module(*tensors(inputs)).numpy()
        parity = parity.worst(_difference(graph.name, expected, run(inputs)))
    return parity


def onnx_runner(path: Path) -> Run:
    """The ONNX file at `path` in ONNX Runtime on the CPU, as a function of its inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def require(parity: Parity, target: Target, *, model: str) -> None:
    """Refuse a conversion that differs by more than its target's gates.

    Raises:
        ArtifactError: it does; the sentence gives both figures and both gates.
    """
    if parity.scaled_max_abs <= target.max_abs and parity.rel_l2 <= target.rel_l2:
        return
    raise ArtifactError(
        f"{model} as {target.name} differs from PyTorch by {parity.scaled_max_abs:.3g} (allowed "
        f"{target.max_abs:.3g}) and by {parity.rel_l2:.3g} relative L2 (allowed {target.rel_l2:.3g}), "
        "so nothing was published; choose a target of higher precision or a larger tolerance",
        field="tolerance",
    )


def _difference(name: str, expected: np.ndarray, given: np.ndarray) -> Parity:
    if given.shape != expected.shape:
        raise ArtifactError(
            f"{name}: the converted graph returns {given.shape} where PyTorch returns {expected.shape}"
        )
    if not np.isfinite(expected).all():
        raise ArtifactError(f"{name}: the model itself returns numbers that are not finite; train it again")
    if not np.isfinite(given).all():
        raise ArtifactError(
            f"{name}: the converted graph returns numbers that are not finite; use a target in fp32"
        )
    difference = given.astype(np.float64) - expected
    largest = float(np.abs(difference).max())
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    rel_l2 = float(np.linalg.norm(difference)) / norm if norm > 0 else largest
    return Parity(largest, largest / max(1.0, float(np.abs(expected).max())), rel_l2)

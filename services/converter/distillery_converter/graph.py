"""One network to export, with fixed inputs and what PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill_core.errors import ArtifactError, out_of_memory
from distillery_converter.calibration import COUNT, Arrays, CalibrationTrajectory

SEED = 20_260_101  # of the fixed inputs
EXAMPLE_BATCH = 2  # to trace with: a batch of 1 would be baked in as a constant, silently
EVALUATION_ERRORS = (RuntimeError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError)


@dataclass(frozen=True)
class Graph:
    """One network to export: `module(*inputs.values())` is one tensor, or a tuple of them; all have the batch first."""

    name: str  # file stem
    module: nn.Module
    outputs: tuple[str, ...]
    inputs: Callable[[int], Arrays]  # fixed inputs for a batch of this size
    served: Callable[[int], list[Arrays]] | None = None  # see `feeds`; None: the fixed inputs are such
    trajectory: CalibrationTrajectory | None = None  # of a denoiser
    makes_pictures: bool = False  # the output is pixels in [-1, 1]
    whole: nn.Module | None = None  # the network in `module` that is lowered in one; None: part by part
    halved: Callable[[Path, Path], None] | None = None  # writes the float32 file's layers in float16
    frees: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # see `kinds.base.Graph`
    classes: str = ""  # the output whose largest entry is the answer
    beside: Mapping[str, str] = field(default_factory=dict)  # texts that go with it, by file name

    def run(self, inputs: Arrays) -> np.ndarray:
        """The first output of `predict`."""
        return self.predict(inputs)[0]

    def predict(self, inputs: Arrays) -> tuple[np.ndarray, ...]:
        """All outputs as PyTorch computes them, on the CPU.

        Raises:
            ArtifactError: it cannot, as the model's weights and settings do not fit together.
        """
        try:
            with torch.inference_mode():
                outputs = self.module(*tensors(inputs))
                return tuple(one.numpy() for one in (outputs if isinstance(outputs, tuple) else (outputs,)))
        except EVALUATION_ERRORS as error:
            if out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"the model's {self.name} cannot be evaluated: {reason}") from error

    def feeds(self, seed: int) -> list[Arrays]:
        """Batches of `COUNT` items as serving feeds them, others for another seed."""
        return self.served(seed) if self.served is not None else [self.inputs(COUNT)]


def tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    """The arrays as torch tensors, in order."""
    return tuple(torch.from_numpy(array) for array in arrays.values())

"""Probes: outputs of a model for fixed inputs, published with it so that a server of it can compare. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from distill_core.config import Config
from distill_core.diffusion.noise import unit_normals
from distill_core.errors import ArtifactError

PROBE = "probe.safetensors"  # beside the weights: `FUNCTION/inputs.NAME` and `FUNCTION/outputs.NAME`
SEED = 1
PROBE_BYTES, HEADER_BYTES = 2**20, 2**16  # of a probe's arrays, and of what names them
CELLS = 8  # a side, at most
VIEW_SIDE = 16  # pixels of a scene's view
VIEW_DEGREES = 30.0  # azimuth and elevation of its camera, at the scene's usual distance


class ImageProbe(Config):
    """Mean and spread of the cells that an image is cut into: a few numbers that no change of backend moves far.

    A denoiser's image is of noise (seed, image 0), its fewest steps and no guidance; a field's a small view.
    """

    seed: int = Field(SEED, ge=0)
    num_steps: int = Field(1, ge=1)
    class_label: int | None = None
    prompt: str | None = None
    shape: tuple[int, int, int]  # channels, rows and columns of cells
    means: tuple[float, ...] = Field(max_length=64 * CELLS**2)
    spreads: tuple[float, ...] = Field(max_length=64 * CELLS**2)  # standard deviation inside each cell

    @model_validator(mode="after")
    def _lengths(self) -> ImageProbe:
        if not len(self.means) == len(self.spreads) == int(np.prod(self.shape)):
            raise ValueError(f"an image probe of shape {self.shape} needs as many means and spreads")
        return self

    @classmethod
    def of(cls, picture: np.ndarray, **inputs: Any) -> ImageProbe:
        """The probe of an image (C, H, W); `inputs` are those that it was made with."""
        shape, means, spreads = _cells(picture)
        return cls(shape=shape, means=means, spreads=spreads, **inputs)

    def difference(self, picture: np.ndarray) -> float:
        """The largest difference of a cell's mean or spread, in units of the picture; infinite for other cells."""
        shape, means, spreads = _cells(picture)
        if shape != self.shape:
            return float("inf")
        return float(np.abs(np.subtract([means, spreads], [self.means, self.spreads])).max())


def _cells(picture: np.ndarray) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]:
    """The cells' shape, means and spreads, rounded to what matters."""
    rows = np.array_split(picture.astype(np.float64), min(CELLS, picture.shape[1]), axis=1)
    cells = [np.array_split(row, min(CELLS, picture.shape[2]), axis=2) for row in rows]
    means, spreads = (
        np.stack([np.stack([measure(cell, axis=(1, 2)) for cell in row], 1) for row in cells], 1).round(6)
        for measure in (np.mean, np.std)
    )
    channels, height, width = means.shape
    return (channels, height, width), tuple(means.ravel().tolist()), tuple(spreads.ravel().tolist())


def probe_picture(shape: tuple[int, int, int]) -> np.ndarray:
    """The fixed small picture (C, h, w) in [-1, 1], float32, that a model which enlarges makes its probe of."""
    picture: np.ndarray = np.tanh(unit_normals([(SEED, 0)], 1, shape)[0]).astype(np.float32)
    return picture


class Probe(NamedTuple):
    """Inputs of one function, and its outputs when the model was published; the batch first."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def differences(self, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """By output the largest difference, relative to the largest value; of whole numbers the share that differs.

        Infinite for an output that is missing, of another shape, NaN or infinite.
        """
        return {name: _difference(values, outputs.get(name)) for name, values in self.outputs.items()}


def write_probe(folder: Path, probe: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the probes of a model's functions, `inputs.NAME` and `outputs.NAME` by function, beside its weights.

    Functions are kept in their order as long as the file stays small; one that is too large has no probe.
    """
    kept: dict[str, np.ndarray] = {}
    for function, part in probe.items():
        arrays = kept | {f"{function}/{key}": values for key, values in part.items()}
        if sum(values.nbytes for values in arrays.values()) <= PROBE_BYTES and (
            len(save(arrays)) <= PROBE_BYTES + HEADER_BYTES
        ):
            kept = arrays
    if kept:
        save_file(kept, folder / PROBE)


def read_probe(folder: Path) -> dict[str, Probe]:
    """The probes beside a model's weights, by function; {} for a model without.

    Raises:
        ArtifactError: the file is damaged, larger than any that is written, or holds something else.
    """
    path = folder / PROBE
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > PROBE_BYTES + HEADER_BYTES:
        raise ArtifactError(
            f"{PROBE} has {size} bytes, and at most {PROBE_BYTES + HEADER_BYTES} are read; publish it again"
        )
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{PROBE} is damaged or not safetensors: {error}; publish it again") from None
    probes: dict[str, Probe] = {}
    for key, values in arrays.items():
        function, _, rest = key.partition("/")
        side, _, name = rest.partition(".")
        if side not in ("inputs", "outputs") or not name or not values.ndim:
            raise ArtifactError(
                f"{PROBE} holds {key!r}, expected FUNCTION/inputs.NAME and FUNCTION/outputs.NAME"
            )
        getattr(probes.setdefault(function, Probe({}, {})), side)[name] = values
    return probes


def _difference(reference: np.ndarray, output: np.ndarray | None) -> float:
    if output is None or output.shape != reference.shape:
        return float("inf")
    if not reference.size:
        return 0.0
    if reference.dtype.kind in "iub":
        return float(np.mean(reference != output))
    exact = reference.astype(np.float64)
    largest = float(np.abs(exact).max())
    difference = float(np.abs(output.astype(np.float64) - exact).max()) / (largest or 1.0)
    return difference if np.isfinite(difference) else float("inf")

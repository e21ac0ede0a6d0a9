"""Recorded radio frames of a .safetensors file: `iq` (N, 2, L), `class_label` (N,), further numbers of the frames."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill_core.config import DataPath, Words
from distill_core.data.classes import Renaming
from distill_core.data.source import Source, checked_labels, existing
from distill_core.errors import DataError

IQ, LABEL = "iq", "class_label"
MAX_BYTES = 2**32  # of the file
SUFFIX = ".safetensors"


class Signals(Source):
    """Frames `iq` (2, L) float32 as they were recorded, with their class, and columns such as `snr` (N,) float32."""

    class Config(Renaming):
        """Options of the recipe's `[data]` table."""

        name: Literal["signals"] = "signals"
        path: DataPath
        class_names: tuple[Words, ...] = Field(min_length=2)  # in the order of the labels

    def __init__(self, config: Config) -> None:
        arrays = read_signals(existing(config.path))
        labels, _ = checked_labels(
            arrays.pop(LABEL),
            count=len(arrays[IQ]),
            num_classes=len(config.class_names),
            what=f"{config.path}, {LABEL}",
        )
        super().__init__(
            config,
            size=len(labels),
            labels=labels,
            class_names=config.renamed(config.class_names),
            arrays={name: torch.from_numpy(values.astype(np.float32)) for name, values in arrays.items()},
        )


def read_signals(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of frames by name, all of as many items.

    Raises:
        DataError: no such file, one that is damaged or too large, `iq` or `class_label` missing or of another shape,
            NaN or infinity; the sentence names the array and the frame.
    """
    if path.suffix != SUFFIX or not path.is_file():
        raise DataError(f"{path} is no {SUFFIX} file; save the frames as one", field="data.path")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read", field="data.path"
        )
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or not safetensors: {error}", field="data.path") from None
    if missing := {IQ, LABEL} - arrays.keys():
        raise DataError(
            f"{path} has {', '.join(sorted(arrays)) or 'no arrays'}, and {' and '.join(sorted(missing))} is missing",
            field="data.path",
        )
    frames = arrays[IQ]
    if frames.ndim != 3 or frames.shape[1] != 2 or 0 in frames.shape:
        raise DataError(
            f"{path}: {IQ} has the shape {frames.shape}; frames are (N, 2, L), in-phase and quadrature",
            field="data.path",
        )
    for name, values in arrays.items():
        _check(path, name, values, len(frames))
    return arrays


def _check(path: Path, name: str, values: np.ndarray, count: int) -> None:
    if values.dtype.kind not in "fiu" or values.ndim < 1 or len(values) != count:
        raise DataError(
            f"{path}: {name} holds {values.dtype} of the shape {values.shape}; one number or frame for each of the "
            f"{count} frames belongs there",
            field="data.path",
        )
    if name not in (IQ, LABEL) and values.ndim > 1:
        raise DataError(
            f"{path}: {name} has the shape {values.shape}; beside {IQ} there is one number a frame",
            field="data.path",
        )
    finite = np.isfinite(values.reshape(count, -1)).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{path}: {name} of frame {int(finite.argmin())} holds NaN or infinity; repair or remove it",
            field="data.path",
        )


SOURCES = {"signals": Signals}

"""IDX files, the form of MNIST and its relatives, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Literal

import numpy as np
from pydantic import Field

from distill_core.config import DataPath
from distill_core.data.classes import Renaming
from distill_core.data.source import Source, array_pixels, checked_labels, existing
from distill_core.errors import DataError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PREFIXES = {"train": "train", "test": "t10k"}  # as the MNIST files are called
MAX_BYTES = 8 * 2**30


class Idx(Source):
    """Pictures (N, H, W) or (N, H, W, C), and labels if there are any."""

    class Config(Renaming):
        """Options of the recipe's `[data]` table."""

        name: Literal["idx"] = "idx"
        path: DataPath  # a folder with the MNIST file names, or the file of pictures
        labels: DataPath | None = None  # the file of labels; in a folder it is found by its name
        split: Literal["train", "test"] = "train"  # which files of a folder
        num_classes: int | None = Field(None, ge=1, le=1_000_000)  # unset: the highest label + 1
        value_range: tuple[float, float] | None = None  # of the numbers; unset: 0..255 integers, 0..1 floats
        limit: int | None = Field(None, ge=1)  # only the first so many

    def __init__(self, config: Config) -> None:
        images, labels = _files(config)
        array = read_idx(images)
        if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
            raise DataError(
                f"{images} has the dimensions {array.shape}; pictures are (N, H, W) or (N, H, W, 1 or 3)",
                field="data.path",
            )
        if array.dtype.kind == "i":
            raise DataError(
                f"{images} holds {array.dtype.name} values; pictures are unsigned bytes or floats",
                field="data.path",
            )
        array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
        numbers, classes = None, 0
        if labels is not None:
            what = str(labels)
            numbers, classes = checked_labels(
                read_idx(labels), count=len(array), num_classes=config.num_classes, what=what
            )
            numbers = numbers[: config.limit]
        pixels = array_pixels(array[: config.limit], value_range=config.value_range, what=str(images))
        names = config.renamed(map(str, range(classes)))
        super().__init__(config, size=len(pixels), pixels=pixels, labels=numbers, class_names=names)


def _files(config: Idx.Config) -> tuple[Path, Path | None]:
    path = existing(config.path)
    labels = None if config.labels is None else existing(config.labels, field="data.labels")
    if path.is_file():
        return path, labels
    prefix = PREFIXES[config.split]
    images = sorted(path.glob(f"{prefix}-images*"))
    if not images:
        raise DataError(
            f"folder {path} holds no {prefix}-images* file; name the file of pictures itself",
            field="data.path",
        )
    return images[0], labels or next(iter(sorted(path.glob(f"{prefix}-labels*"))), None)


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file; the header says the size, and no byte more or less is accepted."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", field="data.path") from None


def _read(file: IO[bytes] | gzip.GzipFile, path: Path) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or magic[3] == 0:
        raise DataError(
            f"{path} is not an IDX file: it begins with {magic.hex() or 'nothing'}", field="data.path"
        )
    dtype, header = np.dtype(TYPES[magic[2]]), file.read(4 * magic[3])
    shape = tuple(np.frombuffer(header[: len(header) // 4 * 4], dtype=">u4").tolist())
    expected = math.prod(shape) * dtype.itemsize
    if expected > MAX_BYTES:
        raise DataError(
            f"{path} says it holds {expected} bytes; at most {MAX_BYTES} are read", field="data.path"
        )
    data = file.read(expected + 1)
    if len(shape) != magic[3] or len(data) != expected:
        raise DataError(
            f"{path} is truncated or too long: its header says {expected} bytes of data; fetch it again",
            field="data.path",
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))


SOURCES = {"idx": Idx}

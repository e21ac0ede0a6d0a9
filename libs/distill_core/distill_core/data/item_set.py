"""Data sets that methods make: pictures, labels and further columns by item, as config.json and data.parquet.

The parquet file is one that `datasets` reads by itself: `image`, `label`, `prompt`, and other columns by their names.
Pictures whose values are bytes are PNG; others, which leave [-1, 1] or lie between two bytes, are float32 arrays.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from distill_core.config import Config
from distill_core.data.pictures import EncodedPixels
from distill_core.data.source import ArrayPixels, Pixels
from distill_core.errors import ArtifactError, ConfigError, DataError, missing_package
from distill_core.files.json_tables import read_table
from distill_core.kinds.dataset.card import Card, ColumnName
from distill_core.signature import TensorSpec

CONFIG, TABLE = "config.json", "data.parquet"
IMAGE, LABEL, PROMPT = "image", "label", "prompt"  # what `datasets` and people call x0, class_label and words
MAX_BYTES = 64 * 2**30  # of a file's columns, unpacked
CHUNK = 256  # pictures that are encoded at a time
MAX_AXES = 5  # of an item's array, as `datasets` knows them


class ItemSetFile(Config):
    """What config.json of a data set's folder says."""

    kind: Literal["dataset"] = "dataset"
    version: Literal[1] = 1
    items: int = Field(ge=1)
    pictures: Literal["png", "float32"] | None = None  # unset: it has none
    columns: dict[ColumnName, TensorSpec] = {}
    class_names: tuple[str, ...] = ()
    prompts: bool = False


class ItemSet:
    """Items by column: pictures `pixels` (N, C, H, W), `labels` (N,) of `class_names`, `arrays` (N, …), `prompts`."""

    kind: ClassVar[str] = "dataset"

    def __init__(
        self,
        pixels: Pixels | Tensor | None = None,
        *,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        arrays: Mapping[str, Tensor] | None = None,
        prompts: list[str] | None = None,
    ) -> None:
        self.pixels = _kept(pixels) if isinstance(pixels, Tensor) else pixels
        self.labels = None if labels is None else labels.detach().cpu()
        self.class_names, self.prompts = tuple(class_names), prompts
        self.arrays = {name: value.detach().cpu() for name, value in (arrays or {}).items()}
        self.size = self._checked()

    def _checked(self) -> int:
        """The number of items, if the columns belong together. Raises ConfigError."""
        columns: dict[str, Any] = {"x0": self.pixels, "class_label": self.labels, "prompts": self.prompts}
        sizes = {name: len(v) for name, v in (columns | self.arrays).items() if v is not None}
        if len(set(sizes.values())) != 1 or not min(sizes.values()):
            said = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no column at all"
            raise ConfigError(
                f"columns of a data set have one number of items, above 0, and these have {said}"
            )
        kept = {"x0": self.pixels.values} if isinstance(self.pixels, ArrayPixels) else {}
        for name, value in (kept | self.arrays).items():
            if not bool(torch.isfinite(value).all()):
                raise ConfigError(f"column {name} of a data set holds NaN or infinity")
        labels, classes = self.labels, len(self.class_names)
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ConfigError(f"labels are 0 to {classes - 1}, one for each class name")
        return next(iter(sizes.values()))

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        columns = {} if self.pixels is None else {"x0": TensorSpec(dtype="float32", shape=self.pixels.shape)}
        if self.labels is not None:
            columns["class_label"] = TensorSpec(dtype="int64", low=0, high=len(self.class_names) - 1)
        for name, value in self.arrays.items():
            dtype: Any = str(value.dtype).removeprefix("torch.")
            columns[name] = TensorSpec(dtype=dtype, shape=tuple(value.shape[1:]))
        return Card(
            items=self.size,
            columns=columns,
            class_names=self.class_names,
            prompts=self.prompts is not None,
        )

    def save(self, folder: Path) -> None:
        """Write config.json and data.parquet."""
        from pyarrow import parquet

        folder.mkdir(parents=True, exist_ok=True)
        png = self._as_png()
        pictures = None if self.pixels is None else ("float32" if png is None else "png")
        described = ItemSetFile(pictures=pictures, **dict(self.card()))
        parquet.write_table(_table(self, png), folder / TABLE)
        (folder / CONFIG).write_text(described.model_dump_json(indent=1), encoding="utf-8")

    def _as_png(self) -> list[bytes] | None:
        """The pictures as PNG; None where their values are no bytes, which PNG would change."""
        if self.pixels is None or self.pixels.shape[0] not in (1, 3):
            return None
        encoded = []
        for indices in torch.arange(self.size).split(CHUNK):
            x0 = self.pixels.take(indices)
            levels = ((x0 + 1) * 127.5).round().clamp(0, 255).byte()
            if not torch.equal(levels.float() / 127.5 - 1, x0):
                return None
            encoded += [_png(level) for level in levels]
        return encoded


def _kept(pictures: Tensor) -> ArrayPixels:
    pictures = pictures.detach().cpu()
    return ArrayPixels(pictures.float() if pictures.is_floating_point() else pictures)


def load_item_set(folder: Path) -> ItemSet:
    """The data set saved in `folder`; PNG pictures are decoded once if they fit into memory, else when asked for.

    Raises:
        ArtifactError: a file is missing or damaged, or does not hold what config.json says.
    """
    from pyarrow import ArrowException, parquet

    try:
        values = read_table(folder / CONFIG)
        kind = values.get("kind")
        if kind != ItemSet.kind:
            raise ConfigError(f"{CONFIG} is of kind {kind!r}, and a data set's is {ItemSet.kind!r}")
        described = ItemSetFile.parse(values)
        with parquet.ParquetFile(folder / TABLE) as file:
            _check_size(file.metadata, described)
            table = file.read()
        return _item_set(table, described)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no data set: it lacks {CONFIG} or {TABLE}") from None
    except (OSError, ValueError, ConfigError, DataError, ArrowException) as error:
        raise ArtifactError(f"{folder} does not hold a data set: {error}") from None


def _check_size(metadata: Any, described: ItemSetFile) -> None:
    held = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    if metadata.num_rows != described.items:
        raise ConfigError(f"{TABLE} has {metadata.num_rows} rows, and {CONFIG} says {described.items}")
    needed = described.items * sum(math.prod(spec.shape) * 8 for spec in described.columns.values())
    if max(held, needed) > MAX_BYTES:
        raise ConfigError(f"{TABLE} holds {max(held, needed)} bytes, and at most {MAX_BYTES} are read")


def _item_set(table: Any, described: ItemSetFile) -> ItemSet:
    arrays = {
        name: _array(table, LABEL if name == "class_label" else name, spec)
        for name, spec in described.columns.items()
        if name != "x0"
    }
    labels = arrays.pop("class_label", None)
    prompts = _column(table, PROMPT).to_pylist() if described.prompts else None
    return ItemSet(
        _pixels(table, described),
        labels=labels,
        class_names=described.class_names,
        arrays=arrays,
        prompts=prompts,
    )


def _pixels(table: Any, described: ItemSetFile) -> Pixels | None:
    if described.pictures is None:
        return None
    spec = described.columns.get("x0")
    if spec is None or len(spec.shape) != 3:
        raise ConfigError("pictures without a column x0 of three axes")
    if described.pictures == "float32":
        return ArrayPixels(_array(table, IMAGE, spec))
    column = _column(table, IMAGE)
    names = f"of {TABLE}"
    pixels = EncodedPixels(
        lambda index: (column[index]["bytes"].as_py() or b"", f"{index} {names}"),
        described.items,
        size=None,
        channels=spec.shape[0],
    )
    if pixels.shape != spec.shape:
        raise ConfigError(f"pictures are {pixels.shape}, and {CONFIG} says {spec.shape}")
    return pixels


def _array(table: Any, name: str, spec: TensorSpec) -> Tensor:
    """A column of numbers as (N, …), whatever lists they are in."""
    column = _column(table, name).combine_chunks()
    while True:
        column = getattr(column, "storage", column)  # of an array type of `datasets`
        if not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
            break
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype != np.dtype(spec.dtype) or values.size != len(table) * math.prod(spec.shape):
        raise ConfigError(
            f"column {name} holds {values.size} values of {values.dtype}, and {CONFIG} says {spec.described} "
            f"for each of {len(table)} items"
        )
    return torch.from_numpy(values.reshape(len(table), *spec.shape).copy())


def _column(table: Any, name: str) -> Any:
    if name not in table.column_names:
        raise ConfigError(f"{TABLE} has no column {name}; it has {', '.join(table.column_names)}")
    column = table.column(name)
    if column.null_count:
        raise ConfigError(f"column {name} is empty in {column.null_count} rows")
    return column


def _table(items: ItemSet, png: list[bytes] | None) -> Any:
    """The columns as a table of Arrow, which also says what they are to `datasets`."""
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "train") from None
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    if png is not None:
        columns[IMAGE], features[IMAGE] = [{"bytes": data, "path": None} for data in png], datasets.Image()
    elif items.pixels is not None:
        x0 = items.pixels.take(torch.arange(items.size))
        columns[IMAGE], features[IMAGE] = x0.numpy(), _feature(datasets, IMAGE, x0)
    if items.labels is not None:
        names = list(items.class_names)
        columns[LABEL], features[LABEL] = items.labels.numpy(), datasets.ClassLabel(names=names)
    if items.prompts is not None:
        columns[PROMPT], features[PROMPT] = items.prompts, datasets.Value("string")
    for name, value in items.arrays.items():
        if name in (IMAGE, LABEL, PROMPT, "x0", "class_label"):
            raise ConfigError(f"a data set's own {name} is no further column; give it another name")
        columns[name], features[name] = value.numpy(), _feature(datasets, name, value)
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata)


def _feature(datasets: Any, name: str, values: Tensor) -> Any:
    dtype, shape = str(values.dtype).removeprefix("torch."), tuple(values.shape[1:])
    if len(shape) > MAX_AXES:
        raise ConfigError(f"column {name} has {len(shape)} axes; an item has at most {MAX_AXES}")
    if len(shape) < 2:
        value = datasets.Value(dtype)
        return datasets.Sequence(value, length=shape[0]) if shape else value
    return getattr(datasets, f"Array{len(shape)}D")(shape=shape, dtype=dtype)


def _png(levels: Tensor) -> bytes:
    """A picture (C, H, W) uint8 as PNG."""
    array = levels.permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(stream, "PNG")
    return stream.getvalue()

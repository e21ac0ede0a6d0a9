"""What a data source is: pictures and labels in an order that depends on (seed, position) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, get_args

import numpy as np
import torch
from pydantic.fields import FieldInfo
from torch import Tensor

from distill_core.artifacts import FORBIDDEN_SUFFIXES
from distill_core.config import Config as SourceConfig
from distill_core.config import PathMark
from distill_core.data.augmentation import ViewConfig, augment, draw_views
from distill_core.data.order import Order, OrderConfig, permutation
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink, small_shape
from distill_core.errors import ConfigError, DataError, nearest
from distill_core.files.paths import files_below, there, user_path
from distill_core.method import Batch, Cond
from distill_core.recipe.tables import ModelSource
from distill_core.signature import TensorSpec

PICKLE_SUFFIXES = (*FORBIDDEN_SUFFIXES, ".npz", ".joblib")


class Folders(Protocol):
    """Where data sets that methods made are found."""

    def folder(self, source: ModelSource) -> Path:
        """The folder of what `source` names."""
        ...


class Pixels(Protocol):
    """Pictures by index, wherever they are kept."""

    shape: tuple[int, int, int]  # (C, H, W)

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1]."""
        ...


class ArrayPixels:
    """Pictures in memory: uint8 0..255, or float32 that is in [-1, 1] already. (N, C, H, W)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape: tuple[int, int, int] = tuple(values.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Tensor) -> Tensor:
        return to_unit(self.values[indices])


class KeptPixels:
    """Some of the pictures of others: those at `chosen` (M,)."""

    def __init__(self, pixels: Pixels, chosen: Tensor) -> None:
        self.pixels, self.chosen, self.shape = pixels, chosen, pixels.shape
        self.skipped: int = getattr(pixels, "skipped", 0)

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: Tensor) -> Tensor:
        return self.pixels.take(self.chosen[indices])


class Source:
    """Base of the sources: an endless, reshuffled stream over `size` items, and the whole set for evaluation.

    A source without pictures (labels or prompts alone) has no `shape`, and its batches have no `x0`. One whose items
    have words has `prompts`, one for each item.
    """

    Config: ClassVar[type[SourceConfig]] = SourceConfig

    def __init__(
        self,
        config: SourceConfig,
        *,
        size: int,
        pixels: Pixels | None = None,
        labels: Tensor | None = None,
        class_names: tuple[str, ...] = (),
        prompts: list[str] | None = None,
        arrays: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.size = size
        self.pixels = pixels
        self.labels = labels  # (N,) int64
        self.class_names = class_names
        self.num_classes: int | None = None if labels is None else len(class_names)
        self.shape: tuple[int, int, int] | None = None if pixels is None else pixels.shape
        self.prompts = prompts
        self.arrays = dict(arrays or {})  # further columns by name, (N, …)
        self.order, self.view = Order(OrderConfig(), size, labels), ViewConfig()
        self._encode: Callable[[list[str]], Cond] | None = None
        self._factor: int | None = None  # of the small pictures that the items are conditioned on
        self._kept: list[str] = []  # digests of what `keep` chose

    @classmethod
    def opened(cls, config: SourceConfig, folders: Folders | None) -> Self:
        """The source that `config` describes; `folders` finds what it refers to."""
        source: Any = cls
        return source(config)  # type: ignore[no-any-return]

    def encode_with(self, encode: Callable[[list[str]], Cond]) -> None:
        """Condition the items on their prompts, as `encode` embeds them, from now on; the builder passes a model's."""
        if self.prompts is None:
            raise DataError("this data has no prompts to encode; choose data that has", field="data.name")
        self._encode = encode

    def shrink_by(self, factor: int) -> None:
        """Condition the items on their own pictures, `factor` times smaller, from now on."""
        if self.shape is None:
            raise DataError(
                "this data has no pictures to enlarge; choose data with pictures", field="data.name"
            )
        small_shape(self.shape, factor, field="data.size")
        self._factor = factor

    @property
    def encodes(self) -> bool:
        """Whether `encode_with` was told how the prompts are embedded."""
        return self._encode is not None

    @property
    def columns(self) -> dict[str, TensorSpec]:
        """What the items have, by name: type and shape of each column."""
        found: dict[str, TensorSpec] = {}
        if self.shape is not None:
            found["x0"] = TensorSpec(dtype="float32", shape=self.shape, low=-1, high=1)
        if self.num_classes is not None:
            found["class_label"] = TensorSpec(dtype="int64", low=0, high=self.num_classes - 1)
        for name, values in self.arrays.items():
            dtype: Any = str(values.dtype).removeprefix("torch.")
            found[name] = TensorSpec(dtype=dtype, shape=tuple(values.shape[1:]))
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the set as a whole, by name."""
        known = {
            "shape": self.shape,
            "num_classes": self.num_classes,
            "class_names": self.class_names or None,
            "prompts": self.prompts,
        }
        return {name: value for name, value in known.items() if value is not None}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the items' ids and of their preprocessing: values that are stored by item belong to it.

        Where the data lie, what their classes are called, their order and their views are no part of it.
        """
        options = self.config.model_dump(mode="json", exclude={"rename_classes", *_places(self.config)})
        made = [options, self.size, self.shape, self._identities(), *self._kept]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def _identities(self) -> list[Any]:
        """What tells these items from others: names and sizes of their files, or their contents without."""
        paths = [getattr(self.config, name) for name in _places(self.config)]
        below = [files_below(user_path(path)) for path in paths if path is not None]
        if below:
            return [(name, file.stat().st_size) for files in below for name, file in files]
        held = dict(self.arrays)
        if isinstance(self.pixels, ArrayPixels):
            held["x0"] = self.pixels.values
        digests = {
            name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
            for name, value in held.items()
        }
        return [digests, self.prompts]

    def keep(self, chosen: Tensor) -> None:
        """Leave out all items but those at `chosen` (M,), which are numbered anew in that order."""
        if isinstance(self.pixels, ArrayPixels):
            self.pixels = ArrayPixels(self.pixels.values[chosen])
        elif self.pixels is not None:
            self.pixels = KeptPixels(self.pixels, chosen)
        self.labels = None if self.labels is None else self.labels[chosen]
        self.prompts = None if self.prompts is None else [self.prompts[i] for i in chosen.tolist()]
        self.arrays = {name: values[chosen] for name, values in self.arrays.items()}
        self.size = len(chosen)
        self._kept.append(hashlib.sha256(chosen.numpy().tobytes()).hexdigest())
        self.order = Order(self.order.config, self.size, self.labels)

    def items(self, indices: Tensor) -> Batch:
        """The items at `indices` (B,), in that order."""
        return self.conditioned(self._stored(indices))

    def _stored(self, indices: Tensor) -> Batch:
        columns = {name: values[indices] for name, values in self.arrays.items()}
        if self.pixels is not None:
            columns["x0"] = self.pixels.take(indices)
        if self.labels is not None:
            columns["class_label"] = self.labels[indices]
        return Batch(indices, columns)

    def conditioned(self, batch: Batch) -> Batch:
        """The batch with what its items are conditioned on; a model may encode here, so in the main thread alone."""
        if self._factor is not None and batch.x0 is not None:
            return replace(batch, cond={LOW_RESOLUTION: shrink(batch.x0, self._factor)})
        return replace(batch, cond=self.conditions(batch.index))

    def conditions(self, indices: Tensor) -> Cond:
        """What the items are conditioned on, by name, batch first: labels, or once `encode_with` said how, prompts."""
        if self._encode is not None and self.prompts is not None:
            return self._encode([self.prompts[index] for index in indices.tolist()])
        return {} if self.labels is None else {"class_label": self.labels[indices]}

    def arrange(self, order: OrderConfig, view: ViewConfig) -> None:
        """Draw items in this order and see them so, from now on; the builder passes `[data.order]` and `[data.view]`.

        Raises:
            ConfigError: an order by classes for data without labels, a view of data without pictures.
        """
        if self.shape is None and not view.is_off:
            raise ConfigError("data.view changes pictures, and this data has none", field="data.view")
        self.order, self.view = Order(order, self.size, self.labels), view

    def batch(self, size: int, *, epoch_seed: int, position: int) -> Batch:
        """Batch number `position` of the endless stream: a function of its arguments, so resuming is exact.

        Epoch e is a permutation seeded by (epoch_seed, e); a batch may reach over the end of an epoch.
        """
        return self.conditioned(self.read(size, epoch_seed=epoch_seed, position=position))

    def read(self, size: int, *, epoch_seed: int, position: int) -> Batch:
        """`batch` without its conditions: what is read, decoded and augmented, in any thread."""
        start, stop = position * size, (position + 1) * size
        indices = self.order.at(epoch_seed, start, stop)
        if self.view.is_off:
            return self._stored(indices)
        return self._viewed(indices, draw_views(self.view, epoch_seed, start, stop))

    def viewed(self, indices: Tensor, view: Mapping[str, Tensor]) -> Batch:
        """The items at `indices` (B,) as exactly that view shows them: a view of an earlier batch is replayed."""
        return self.conditioned(self._viewed(indices, view))

    def _viewed(self, indices: Tensor, view: Mapping[str, Tensor]) -> Batch:
        batch = self._stored(indices)
        assert batch.x0 is not None
        return replace(batch.with_x0(augment(batch.x0, view)), view=dict(view))

    def all(self, limit: int | None = None) -> Batch:
        """Every item, or `limit` of them: always the same ones, picked at random, in the set's order."""
        return self.items(self.picked(limit))

    def picked(self, limit: int | None = None) -> Tensor:
        """The indices of `all(limit)`."""
        if limit is None or limit >= self.size:
            return torch.arange(self.size)
        return permutation(self.size, 0, 0)[:limit].sort().values

    def class_frequencies(self) -> Tensor:
        """Share of each class among the items, (K,), summing to 1."""
        if self.labels is None:
            raise DataError("this data has no labels, so it has no class frequencies; choose labelled data")
        return torch.bincount(self.labels, minlength=len(self.class_names)).double() / self.size


def _places(config: SourceConfig) -> list[str]:
    """The options that name files, which another machine has elsewhere."""
    return [
        name
        for name, field in type(config).model_fields.items()
        if any(isinstance(mark, PathMark) for mark in _marks(field))
    ]


def _marks(field: FieldInfo) -> list[Any]:
    inner = [mark for one in get_args(field.annotation) for mark in getattr(one, "__metadata__", ())]
    return [*field.metadata, *inner]


def to_unit(values: Tensor) -> Tensor:
    """uint8 0..255 as float32 in [-1, 1]; floating point values pass unchanged."""
    return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values


def existing(path: str, *, field: str = "data.path") -> Path:
    """`path` as a file or folder that exists and is not a pickle in disguise."""
    found = user_path(path, field=field)
    if not there(found):
        raise DataError(
            f"data path {path} does not exist; give a file or folder that this process can read", field=field
        )
    refuse_pickle(found, field=field)
    return found


def refuse_pickle(path: Path, *, field: str = "data.path") -> None:
    """Raise for formats that can execute code when they are read."""
    if path.is_file() and path.suffix.lower() in PICKLE_SUFFIXES:
        raise DataError(
            f"{path} is refused: {path.suffix} files can execute code when read; "
            "convert it to pictures, parquet, arrow or IDX",
            field=field,
        )


def array_pixels(values: np.ndarray, *, value_range: tuple[float, float] | None, what: str) -> ArrayPixels:
    """Pictures from numbers (N, C, H, W) in `value_range`; unset: 0..255 for integers, 0..1 for floats.

    Raises:
        DataError: not numbers, not finite, or outside the range; the message names `what` and the item.
    """
    if values.dtype.kind not in "uif":
        raise DataError(
            f"{what} holds {values.dtype} values; pictures are unsigned bytes or floats", field="data.path"
        )
    low, high = value_range or ((0.0, 1.0) if values.dtype.kind == "f" else (0.0, 255.0))
    if not (0 not in values.shape and low < high):
        raise DataError(f"{what} is empty, or its value_range {low:g} to {high:g} is", field="data.path")
    flat = values.reshape(len(values), -1)
    if not (finite := np.isfinite(flat).all(axis=1)).all():
        raise DataError(
            f"{what} holds NaN or infinity in item {int(finite.argmin())}; repair or remove it",
            field="data.path",
        )
    inside = ((flat >= low) & (flat <= high)).all(axis=1)
    if not inside.all():
        raise DataError(
            f"{what}: item {int(inside.argmin())} is not within {low:g} to {high:g}; set data.value_range",
            field="data.value_range",
        )
    if values.dtype.kind in "ui" and (low, high) == (0, 255):
        return ArrayPixels(torch.from_numpy(values.astype(np.uint8)))
    scaled = (values.astype(np.float64) - low) * (2 / (high - low)) - 1
    return ArrayPixels(torch.from_numpy(scaled.astype(np.float32)))


def checked_labels(
    values: np.ndarray, *, count: int, num_classes: int | None, what: str
) -> tuple[Tensor, int]:
    """Class labels (N,) int64 and the number of classes (unset: the highest label + 1).

    Raises:
        DataError: not integers, another number than `count`, or out of range; the message names the item.
    """
    if values.dtype.kind not in "ui" or values.ndim != 1:
        raise DataError(
            f"{what} holds {values.dtype} values of shape {values.shape}; a label is one whole number",
            field="data.label_column",
        )
    if len(values) != count:
        raise DataError(
            f"{what} holds {len(values)} labels for {count} pictures; give matching files", field="data.path"
        )
    classes = num_classes or int(values.max()) + 1
    wrong = (values < 0) | (values >= classes)
    if wrong.any():
        item = int(wrong.argmax())
        raise DataError(
            f"{what}: label {values[item]} of item {item} is out of range 0 to {max(classes - 1, 0)}; "
            "set data.num_classes, or use data without unlabelled items",
            field="data.num_classes",
        )
    return torch.from_numpy(values.astype(np.int64)), classes


def unknown_choice(what: str, given: str, known: Any, *, field: str) -> ConfigError:
    """The error for a column, split or the like that the data does not have."""
    return ConfigError(f"the data has no {what} {given!r}{nearest(given, known)}", field=field)

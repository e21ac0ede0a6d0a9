"""Values by item of one data set, in memory and as safetensors: stored soft labels, memories of past predictions.

A row belongs to an item by its id. A store has one row for each item, or, where views are replayed, one for each view
that was drawn. Its header says of which data and how the values were made; other data are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill_core.config import Config, Seed, Words
from distill_core.data.augmentation import ViewConfig, check_view
from distill_core.data.order import OrderConfig
from distill_core.data.source import Source, existing
from distill_core.errors import ConfigError, DataError
from distill_core.signature import TensorSpec

HEADER, INDEX, VIEW = (
    "distillery",
    "index",
    "view.",
)  # the header's key, a tensor, and what names of views begin with


class Origin(Config):
    """Of which data a store's values are, and how they were made."""

    version: Literal[1] = 1
    fingerprint: Words  # of the data
    size: int = Field(ge=1)  # items of the data
    teacher: Words = ""  # who made the values: name@version, or a recipe's key
    temperature: float | None = Field(None, gt=0)  # that divided the logits; unset: nothing did
    transform: ViewConfig = ViewConfig()  # from which views were drawn
    order: OrderConfig | None = None  # in which rows follow each other; unset: none that means anything
    seed: Seed = 0  # of order and views
    batch_size: int = Field(1, ge=1)  # rows of one batch


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of a store: ids (B,), values and views by name, batch first."""

    index: Tensor
    values: dict[str, Tensor]
    view: dict[str, Tensor]


class ItemStore:
    """Rows of values by item. `index` (M,) are the items' ids; values and views (M, …) lie in memory or in the file."""

    def __init__(
        self,
        origin: Origin,
        index: Tensor,
        values: Mapping[str, Tensor],
        view: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.origin, self.index = origin, index
        self.values, self.view = dict(values), dict(view or {})
        self._check()
        row = np.full(origin.size, -1)
        row[index.numpy()] = np.arange(len(index))  # of several rows of an item the last one counts
        self._row = torch.from_numpy(row)

    @classmethod
    def blank(cls, source: Source, columns: Mapping[str, TensorSpec], **made: Any) -> Self:
        """A row of zeros for each item of `source`; `made` are further facts of the `Origin`."""
        origin = Origin(fingerprint=source.fingerprint, size=source.size, **made)
        values = {
            name: torch.zeros(source.size, *spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in columns.items()
        }
        return cls(origin, torch.arange(source.size), values)

    @classmethod
    def open(cls, path: str, source: Source, *, field: str = "path") -> Self:
        """The store in a file, for the data that it was made of.

        Raises:
            DataError: no such file, not such a store, damaged, or made of other data; `field` names the option.
        """
        file = existing(path, field=field)
        try:
            with safe_open(file, "pt") as opened:  # maps the file; what is not asked for is not read
                origin = _origin(opened.metadata() or {})
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            _check_data(origin, source)
            view = {name.removeprefix(VIEW): t for name, t in tensors.items() if name.startswith(VIEW)}
            index = tensors.pop(INDEX, torch.empty(0))
            return cls(origin, index, {n: t for n, t in tensors.items() if not n.startswith(VIEW)}, view)
        except (ConfigError, SafetensorError, OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be used as values by item: {error}", field=field) from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        views = {VIEW + name: value for name, value in self.view.items()}
        tensors = {INDEX: self.index, **self.values, **views}
        draft = path.with_suffix(".tmp")
        header = {HEADER: self.origin.model_dump_json()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, draft, header)
        draft.replace(path)

    def __len__(self) -> int:
        return len(self.index)

    def at(self, index: Tensor) -> dict[str, Tensor]:
        """The values of the items `index` (B,), of each in its last row.

        Raises:
            DataError: an item without a row.
        """
        rows = self._rows_of(index)
        return {name: value[rows] for name, value in self.values.items()}

    def put(self, index: Tensor, **values: Tensor) -> None:
        """Replace values of the items `index` (B,), in memory; those of other names stay.

        Raises:
            DataError: an item without a row.
        """
        rows = self._rows_of(index)
        for name, value in values.items():
            self.values[name][rows] = value.detach().to(self.values[name])

    def rows(self, start: int, stop: int) -> Stored:
        """The rows `start` to `stop` in the order of the file, with which `Source.viewed` replays a batch.

        Raises:
            DataError: rows that the store does not have.
        """
        if not 0 <= start < stop <= len(self):
            raise DataError(f"rows {start} to {stop} were asked for, and {len(self)} are stored")
        values, view = (
            {name: value[start:stop] for name, value in part.items()} for part in (self.values, self.view)
        )
        return Stored(self.index[start:stop], values, view)

    def _rows_of(self, index: Tensor) -> Tensor:
        index = index.cpu()
        rows = self._row[index]
        if (missing := rows < 0).any():
            raise DataError(f"nothing is stored for item {int(index[missing][0])}; make the values again")
        return rows

    def _check(self) -> None:
        """Refuse ids and rows that do not belong together. Raises ConfigError."""
        index, size = self.index, self.origin.size
        if index.dtype != torch.int64 or index.ndim != 1 or not len(index):
            raise ConfigError(f"its {INDEX} is {index.dtype} {tuple(index.shape)}; ids are int64 (rows,)")
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise ConfigError(f"its ids are {int(index.min())} to {int(index.max())}, of {size} items")
        for name, value in {
            **self.values,
            **{VIEW + name: value for name, value in self.view.items()},
        }.items():
            if not value.ndim or len(value) != len(index):
                raise ConfigError(f"{name} has the shape {tuple(value.shape)}, for {len(index)} rows")
        if not self.values:
            raise ConfigError("it holds no values")
        check_view(self.view)


def _origin(header: Mapping[str, str]) -> Origin:
    if HEADER not in header:
        raise ConfigError(f"its header has no entry {HEADER!r}, which says what the values are of")
    values = json.loads(header[HEADER])
    return Origin.parse(values if isinstance(values, dict) else {}, where="header")


def _check_data(origin: Origin, source: Source) -> None:
    if origin.fingerprint != source.fingerprint:
        counts = f"{origin.size} items there, {source.size} here"
        raise ConfigError(
            f"it was made of other data ({counts}; files, order of items or preprocessing differ); "
            "make it again of this data, or use the data that it was made of"
        )
    if origin.size != source.size:
        raise ConfigError(f"it says that its data have {origin.size} items, and they have {source.size}")

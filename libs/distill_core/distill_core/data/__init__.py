"""Data sources, found by name. Each module of this package lists its classes in a `SOURCES` dictionary."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from distill_core.config import Config as SourceConfig
from distill_core.data.augmentation import ViewConfig
from distill_core.data.label_views import LabelViewConfig, view_labels
from distill_core.data.order import OrderConfig
from distill_core.data.source import Folders, Source
from distill_core.errors import ConfigError, nearest

__all__ = ["Source", "build_source", "named_tables", "names_source", "parse_source", "source_types"]

MADE = "artifact"  # the source of a table that names a recipe alone


def source_types() -> dict[str, type[Source]]:
    """Every source there is: the name that a recipe's `[data]` table gives, and its class."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    types: dict[str, type[Source]] = {}
    for module in modules:
        types.update(getattr(importlib.import_module(f"{__name__}.{module}"), "SOURCES", {}))
    return types


def named_tables(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The data sets of a recipe's `[data]` table: `data`, and by its own name each table in it that names a source."""
    inner = {key: table for key, table in values.items() if isinstance(table, dict) and names_source(table)}
    return {"data": {key: value for key, value in values.items() if key not in inner}, **inner}


def names_source(table: Mapping[str, Any]) -> bool:
    """Whether a table says what its data are: a source by its name, or a recipe that makes them."""
    return "name" in table or "recipe" in table


def build_source(values: Mapping[str, Any], *, where: str = "data", folders: Folders | None = None) -> Source:
    """The data source that a table describes; mistakes are named by their key under `where`.

    `folders` finds data sets of the store and those that recipes make.

    Raises:
        ConfigError: no or an unknown `name`, an unknown option, or a value out of range.
        DataError: the data cannot be used; the message names the file or item.
    """
    cls, config = parse_source(values, where=where)
    order = OrderConfig.parse(_table(values, "order", where), where=f"{where}.order")
    view = ViewConfig.parse(_table(values, "view", where), where=f"{where}.view")
    labels = LabelViewConfig.parse(_labels(values), where=where)
    source: Source = cls.opened(config, folders)
    view_labels(source, labels, where=where)
    source.arrange(order, view)
    return source


def parse_source(values: Mapping[str, Any], *, where: str = "data") -> tuple[Any, SourceConfig]:
    """The class of the source that a table names, and its options; nothing is read of the data.

    Raises:
        ConfigError: no or an unknown `name`, an unknown option, or a value out of range.
    """
    known = source_types()
    name = values.get("name", MADE if "recipe" in values else None)
    if not isinstance(name, str):
        raise ConfigError(
            f"missing key {where}.name; known: {', '.join(sorted(known))}", field=f"{where}.name"
        )
    if name not in known:
        raise ConfigError(f"no data source is called {name!r}{nearest(name, known)}", field=f"{where}.name")
    cls: Any = known[name]
    LabelViewConfig.parse(_labels(values), where=where)
    shared = {"order", "view", *LabelViewConfig.model_fields}
    own = {key: value for key, value in values.items() if key not in shared}
    return cls, cls.Config.parse({"name": name, **own}, where=where)


def _labels(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in LabelViewConfig.model_fields if key in values}


def _table(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    table = values.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"{where}.{key} = {table!r} is not allowed: a table of keys belongs here", field=f"{where}.{key}"
        )
    return table

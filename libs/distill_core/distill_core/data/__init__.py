"""Data sources, found by name. Each module of this package lists its classes in a `SOURCES` dictionary."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from distill_core.data.source import Source
from distill_core.errors import ConfigError, nearest

__all__ = ["Source", "build_source", "source_types"]


def source_types() -> dict[str, type[Source]]:
    """Every source there is: the name that a recipe's `[data]` table gives, and its class."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: dict[str, type[Source]] = {}
    for module in modules:
        found.update(getattr(importlib.import_module(f"{__name__}.{module}"), "SOURCES", {}))
    return found


def build_source(values: Mapping[str, Any]) -> Source:
    """The data source that a recipe's `[data]` table describes.

    Raises:
        ConfigError: no or an unknown `name`, an unknown option, or a value out of range.
        DataError: the data cannot be used; the message names the file or item.
    """
    known = source_types()
    name = values.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"missing key data.name; known: {', '.join(sorted(known))}", field="data.name")
    if name not in known:
        raise ConfigError(f"no data source is called {name!r}{nearest(name, known)}", field="data.name")
    cls: Any = known[name]
    return cls(cls.Config.parse(values, where="data"))

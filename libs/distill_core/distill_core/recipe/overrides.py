"""Overrides of a recipe by dotted key, and what of it goes when its data or its teacher are others."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, TypeVar

from distill_core.errors import ConfigError
from distill_core.recipe.tables import ModelSource

MODEL_SOURCES = frozenset(ModelSource.model_fields)  # of which there is one at a time
STUDENT_SOURCES = ("artifact", "path", "recipe", "network")
MADE_OF = (
    "data",
    "teacher",
    "student",
    "network",
    "extractor",
)  # tables that a title and a licence are about
IN_TITLES = ("levels", "level", "step_counts", "parts")  # and of [config] what a title may count
_T = TypeVar("_T")


def without_none(value: _T) -> _T:
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}  # type: ignore[return-value]
    if isinstance(value, list):
        return [without_none(entry) for entry in value]  # type: ignore[return-value]
    return value


def dotted(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in table.items():
        entries |= dotted(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return entries


def changed(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted keys replaced, and without what they said of other data or another teacher."""
    before = deepcopy(values)
    for key, value in changes.items():
        _set_dotted(values, key, value)
    described = {key for key in changes if key in ("title", "publish", "publish.licence")}
    made_otherwise = any(before.get(table) != values.get(table) for table in MADE_OF)
    if "title" not in described and (made_otherwise or _counts(before) != _counts(values)):
        values.pop("title", None)
    if described <= {"title"} and made_otherwise and isinstance(values.get("publish"), dict):
        values["publish"].pop("licence", None)
    _note_teacher(before, values, changes)
    return values


def _counts(values: Mapping[str, Any]) -> list[Any]:
    table = values.get("config")
    return [table.get(key) for key in IN_TITLES] if isinstance(table, Mapping) else []


def _note_teacher(before: Mapping[str, Any], values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Keep whom the recipe was written for: its levels and learning rates are those of that teacher."""
    former = before.get("replaced")
    teacher = before.get("teacher")
    if former is None and isinstance(teacher, Mapping) and values.get("teacher") not in (None, teacher):
        former = {"recipe": teacher["recipe"]} if isinstance(teacher.get("recipe"), str) else None
    if isinstance(former, Mapping) and "replaced" not in changes:
        given = sorted({*former.get("given", ()), *changes})
        values["replaced"] = {**former, "given": given}


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    table = values
    for parent in parents:
        nested = table.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"cannot set {key}: {parent} is a value, not a table", field=key)
        table = nested
    if last in MODEL_SOURCES and table.keys() <= MODEL_SOURCES | {"adapters"}:
        for other in MODEL_SOURCES:  # one source replaces the other
            table.pop(other, None)
    if parents == ["network"] and last == "name" and table.get("name") != value:
        table.pop("args", None)  # they were those of another class
    if parents == ["student"] and last in STUDENT_SOURCES:
        for other in STUDENT_SOURCES:
            table.pop(other, None)
    table[last] = deepcopy(value)


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["config.guidance=2", "data.path=/x"]` as a dictionary; values are TOML, anything else is a string."""
    changes: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {item!r} is not KEY=VALUE, e.g. config.guidance=2")
        try:
            changes[key.strip()] = tomllib.loads(f"v = {text}")["v"]
        except ValueError:  # also a number of thousands of digits
            changes[key.strip()] = text.strip()
    return changes

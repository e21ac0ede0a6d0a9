"""The reference: every recipe key, data source, method setting, field argument and figure, as tables."""

from __future__ import annotations

import inspect
import tomllib
from dataclasses import replace
from importlib import resources
from typing import Any

from pydantic import BaseModel

from distill_core.data import source_types
from distill_core.kinds import find_card, kind_names
from distill_core.methods import find_method, method_names
from distill_core.networks.fields import FIELDS
from distill_core.networks.predictors import network_families, network_types
from distill_core.recipe import Recipe
from distill_core.reference.tables import Key, Table, first_sentence, tables

__all__ = ["Key", "Table", "figures", "library_reference", "settings_reference", "words"]


NAMED = {"optim": "ROLE", "teachers": "NAME", "stages": "STAGE"}  # tables of tables, and what their names are


def words() -> dict[str, dict[str, str]]:
    """Meanings that the classes themselves do not say."""
    return tomllib.loads((resources.files(__name__) / "words.toml").read_text(encoding="utf-8"))


def library_reference() -> dict[str, list[Table]]:
    """Chapters of tables: the recipe, data sources, methods, fields, figures."""
    descriptions = words()
    return {
        "Recipe": list(tables(Recipe, "", descriptions, upper=NAMED)),
        "Evaluation": [table for name in kind_names() for table in _of_kind(name, descriptions)],
        "Data sources": [
            table
            for name, cls in source_types().items()
            for table in _about(cls.Config, f"data.{name}", cls, descriptions)
        ],
        "Methods": [table for name in method_names() for table in _of_method(name, descriptions)],
        "Fields": [
            table
            for name, cls in FIELDS.items()
            for table in _about(cls.Config, f"network.{name}", cls, descriptions)
        ],
        "Networks": [
            table
            for name, cls in (network_types() | _families()).items()
            for table in _about(cls.Args, f"network.{name}", cls, descriptions)
        ],
        "Figures": [figures()],
    }


def settings_reference(settings: type[BaseModel], prefix: str) -> Table:
    """The environment variables that begin with `prefix`."""
    (table,) = tables(settings, prefix, words())
    names = [
        str(field.validation_alias or f"{prefix}{name.upper()}")
        for name, field in settings.model_fields.items()
    ]
    return replace(
        table, keys=tuple(replace(key, name=name) for key, name in zip(table.keys, names, strict=True))
    )


def figures() -> Table:
    """The figures that are measured; all are numbers."""
    descriptions = words()
    whole = [Key(name, "number", "", "", meaning) for name, meaning in descriptions["figures"].items()]
    parts = [Key(f"{name}…", "number", "", "", f"{meaning}: any figure above") for name, meaning in
             descriptions["figure_prefixes"].items()]  # fmt: skip
    meaning = (
        "What `evaluate` and `check` measure, and prefixes that say of what. Not every run has every figure."
    )
    return Table("figures", meaning, (*whole, *parts))


def _families() -> dict[str, Any]:
    return {f"{family}:NAME": cls for family, cls in network_families().items()}


def _of_method(name: str, descriptions: dict[str, dict[str, str]]) -> list[Table]:
    method = find_method(name)
    module: Any = inspect.getmodule(method)
    return _about(method.Config, f"config.{name}", module, descriptions)


def _of_kind(name: str, descriptions: dict[str, dict[str, str]]) -> list[Table]:
    """The [evaluate] table of a method whose result is of this kind."""
    card = find_card(name)
    first, *rest = tables(card.Evaluate, f"evaluate.{name}", descriptions)
    return [replace(first, meaning=f"Of a result of the kind {name}. {first.meaning}"), *rest]


def _about(
    model: type[BaseModel], path: str, described: Any, descriptions: dict[str, dict[str, str]]
) -> list[Table]:
    """The tables of `model`, the first with the words of what it configures."""
    first, *rest = tables(model, path, descriptions)
    return [replace(first, meaning=first_sentence(described)), *rest]

"""Suggestions for recipes and keys that do not exist under the name given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from distill_core.errors import ConfigError, DistilleryError, NotFound, nearest

SHOWN = 3  # keys that could be meant


def no_such_recipe(source: str, names: Collection[str]) -> DistilleryError:
    """The error for what is neither a recipe's name nor the path of a .toml file."""
    path = Path(source)
    hint = "a recipe is a .toml file, or a name that `distillery methods` lists"
    if path.is_dir():
        message = f"{source} is a folder, and {hint}; a run in it goes on by --out {source}"
        return ConfigError(message, field="recipe")
    if path.exists():
        return ConfigError(f"{source} is a file, but no recipe: {hint}", field="recipe")
    if path.stem in names and path.suffix == ".toml":
        return NotFound(
            f"recipe file {source} does not exist; did you mean the recipe {path.stem!r}?", field="recipe"
        )
    if path.suffix or "/" in source:
        return NotFound(f"recipe file {source} does not exist; {hint}", field="recipe")
    return NotFound(f"no recipe is called {source!r}{nearest(source, names)}", field="recipe")


def check_no_pipeline(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a pipeline's file, which holds several recipes."""
    if "stages" in values and "method" not in values:
        raise ConfigError(
            "this is a pipeline, not a recipe; queue it with: distillery submit --pipeline FILE",
            field="recipe",
        )


def meant(
    error: ConfigError, overrides: Mapping[str, Any], values: Mapping[str, Any], recipe: type[BaseModel]
) -> ConfigError:
    """`error`, or a better one if an override names a key that lies elsewhere, as `lr` does in optim.teacher.lr."""
    field = error.field or ""
    override = next((key for key in overrides if key == field or key.startswith(f"{field}.")), None)
    if override is None or override in set(_known(recipe, values)):
        return error
    last = override.rpartition(".")[2]
    candidates: list[str] = []
    for keys in (
        _dotted(values),
        _known(recipe, values),
    ):  # what the recipe sets comes before what it could set
        named = (key for key in keys if key.rpartition(".")[2] == last and key != override)
        candidates = candidates or [key for key in named if not key.startswith("check.")]
    if not candidates:
        return error
    more = " …" if len(candidates) > SHOWN else ""
    shown = " or ".join(map(repr, candidates[:SHOWN]))
    return ConfigError(f"unknown key {override}; did you mean {shown}{more}?", field=override)


def _dotted(table: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _known(model: type[BaseModel], values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Every key that `model` allows; in a table of tables, for each name that `values` has."""
    for name, field in model.model_fields.items():
        yield f"{before}{name}"
        nested = values.get(name)
        inner = next((kind for kind in _kinds(field.annotation) if _is_model(kind)), None)
        if inner is None or tuple in {get_origin(kind) for kind in _kinds(field.annotation)}:
            continue  # a list of tables is set as a whole
        at = nested if isinstance(nested, Mapping) else {}
        if dict in {
            getattr(kind, "__origin__", None) for kind in (field.annotation, *get_args(field.annotation))
        }:
            for key, table in at.items():
                if isinstance(table, Mapping):
                    yield from _known(inner, table, f"{before}{name}.{key}.")
        else:
            yield from _known(inner, at, f"{before}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)

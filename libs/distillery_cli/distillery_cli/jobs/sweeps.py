"""Meaning of `KEY=A,B` in `submit`: one value that holds a comma, as for `train`, or a run for each of several."""

from __future__ import annotations

from collections.abc import Iterable

from distill_core.errors import ConfigError, DistilleryError
from distill_core.recipe import Recipe, load_recipe, parse_overrides
from distill_service.jobs.paths import PATH_KEYS


def could_be_value(recipe: str, key: str, text: str, others: Iterable[str] = ()) -> bool:
    """Whether `text`, which holds commas, is a value that `key` of this recipe, with `others` set, may have."""
    last = key.rpartition(".")[2]
    if last in PATH_KEYS:
        return True
    if last == "artifact" or (last == "recipe" and not text.endswith(".toml")):
        return False  # names, which hold no comma
    try:
        changed = load_recipe(recipe, parse_overrides([*others, f"{key}={text}"]))
        _check_tables(changed, key)
    except DistilleryError:
        return False
    return True


def _check_tables(recipe: Recipe, key: str) -> None:
    """Look at the table of `key` where the recipe leaves it to its method or data source."""
    table = key.partition(".")[0]
    if table == "config":
        from distill_core.methods import find_method

        find_method(recipe.method).Config.parse(recipe.config, where=table)
    elif table == "data" and recipe.data is not None:
        from distill_core.data import named_tables, parse_source

        for name, values in named_tables(recipe.data).items():
            parse_source(values, where=table if name == table else f"{table}.{name}")
    elif table in ("network", "student", "evaluate") and key.count(".") > 1:
        raise ConfigError("arguments of a network hold no such text", field=key)

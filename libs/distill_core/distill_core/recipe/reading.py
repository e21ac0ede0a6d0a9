"""Recipes by name, from files and from values."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from distill_core.errors import ConfigError
from distill_core.files.text import read_text
from distill_core.recipe.overrides import changed
from distill_core.recipe.recipe import Recipe
from distill_core.recipe.suggestions import check_no_pipeline, meant, no_such_recipe


def recipe_names() -> list[str]:
    """Names of the recipes that come with the library."""
    folder = resources.files("distill_core.recipes")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, from a .toml file, or from values; then `overrides` by dotted key.

    Raises:
        NotFound: no such recipe name or file.
        ConfigError: not TOML, an unknown key, a value of the wrong type or out of range.
    """
    values = dict(source) if isinstance(source, Mapping) else _read_toml(str(source))
    check_no_pipeline(values)
    try:
        return Recipe.parse(changed(values, overrides or {}))
    except ConfigError as error:
        raise meant(error, overrides or {}, values, Recipe) from None


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path} is not a text file; a recipe is TOML in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None


def _read_toml(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise no_such_recipe(source, recipe_names())
        text = _read_text(path)
    else:
        if source not in recipe_names():
            raise no_such_recipe(source, recipe_names())
        text = (resources.files("distill_core.recipes") / f"{source}.toml").read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise ConfigError(f"recipe {source} is not valid TOML: {error}") from None

"""Files of a worker that a submitted job may name: those under the data roots, and no others.

This check goes by the names of keys and by what looks like a path, so that it needs no model library. The binding one
is the job's own process's, which walks the schemas of the recipe's tables (`distill_core.recipe.references`).

Training in one's own process (`distillery train`) is not concerned: there the files are the caller's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_core.files.paths import check_readable, looks_like_path, user_path
from distill_service.settings import Settings

PATH_KEYS = frozenset({"path", "lpips"})  # keys of a recipe whose value is a file or folder
FILE_KEYS = frozenset(
    {"labels", "images"}
)  # keys whose value is one, unless it is a word or in the data's folder
WORD_KEYS = frozenset({"title"})  # keys whose value is words
WORD_LISTS = frozenset(
    {"prompts", "negative_prompts", "texts", "class_names"}
)  # the same, where it is a list
WORD_TABLES = frozenset({"rename_classes", "publish"})  # tables of words: a class may be called `path`
LABEL_WORDS = frozenset({"auto", "folder", "none"})  # what data.labels may say instead


def check_paths(spec: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a specification that names a file outside the settings' data roots.

    The Jobs API asks before a job is queued, the worker, which sees the files themselves, before it starts one.

    Raises:
        ConfigError: a path outside the roots, or a recipe that is a file; `field` is its key.
    """
    roots = settings.readable_roots()
    if roots is None:
        return
    for key, name in _named(spec):
        check_readable(key, name, roots, recipe=key.rpartition(".")[2] == "recipe")


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tables with each path that is relative as it is from this process's folder, and `~` this user's home.

    Whoever submits a job means the folder where they are, and not the one that a worker was started in.
    """
    return {key: _absolute(key, value) for key, value in values.items()}


def absolute_value(key: str, value: Any) -> Any:
    """The same for the value of one dotted key."""
    *tables, last = key.strip().split(".")
    return value if WORD_TABLES & {*tables} else _absolute(last, value)


def _absolute(key: str, value: Any) -> Any:
    if _is_words(key, value):
        return dict(value) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        return absolute(value)
    if isinstance(value, list | tuple):
        return [_absolute("", item) for item in value]
    in_the_data = key == "images"  # pictures of a capture, from its own folder
    if isinstance(value, str) and value and not in_the_data and _is_path(key, value):
        return str(user_path(value, field=key).absolute())
    return value


def _named(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys and values of a specification that name files."""
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else key
        if _is_words(key, value):
            continue
        if isinstance(value, Mapping):
            yield from _named(value, dotted)
        elif isinstance(value, list):
            yield from _named({str(number): item for number, item in enumerate(value)}, dotted)
        elif isinstance(value, str) and _is_path(key, value):
            base = values.get("path")
            inside = key == "images" and isinstance(base, str) and not value.startswith(("/", "~"))
            yield dotted.removeprefix("recipe."), f"{base}/{value}" if inside else value


def _is_words(key: str, value: Any) -> bool:
    listed = key in WORD_LISTS and isinstance(value, list | tuple)
    return listed or key in WORD_TABLES or (key in WORD_KEYS and isinstance(value, str))


def _is_path(key: str, value: str) -> bool:
    if looks_like_path(value):
        return True
    if key == "recipe":
        return Path(value).suffix == ".toml"
    if key == "labels":
        return value not in LABEL_WORDS
    return key in PATH_KEYS or (key in FILE_KEYS and "/" in value)

"""Which of a worker's files a submitted job may name: those under the data roots, and no others.

Training in one's own process (`distillery train`) is not concerned: there the files are the caller's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_core.errors import ConfigError
from distill_core.paths import user_path
from distill_service.settings import Settings

PATH_KEYS = frozenset({"path", "lpips"})  # keys of a recipe whose value is a file or folder
FILE_KEYS = frozenset(
    {"labels", "images"}
)  # keys whose value is one, unless it is a word or in the data's folder
WORD_TABLES = frozenset({"rename_classes"})  # tables of words: a class may be called `path`
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
        if key.rpartition(".")[2] == "recipe":
            raise ConfigError(
                f"{key} = {name!r} is a file: a job names recipes that come with the library", field=key
            )
        # resolve() follows links, so that one inside a root cannot lead out of it
        where = user_path(name, field=key).resolve()
        if not Path(name).is_absolute() or not any(where.is_relative_to(root) for root in roots):
            raise ConfigError(f"{key} = {name!r} may not be read by a job: {_allowed(roots)}", field=key)


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
    if isinstance(value, Mapping):
        return dict(value) if key in WORD_TABLES else absolute(value)
    if isinstance(value, list | tuple):
        return [_absolute("", item) for item in value]
    in_the_data = key == "images"  # pictures of a capture, from its own folder
    if isinstance(value, str) and value and not in_the_data and _is_path(key, value):
        return str(user_path(value, field=key).absolute())
    return value


def _allowed(roots: Sequence[Path]) -> str:
    if not roots:
        return "no folder is open to jobs; the operator names some in DISTILLERY_DATA_ROOTS"
    return f"give an absolute path under {', '.join(map(str, roots))} (DISTILLERY_DATA_ROOTS)"


def _named(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys and values of a specification that name files."""
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else key
        if key in WORD_TABLES:
            continue
        if isinstance(value, Mapping):
            yield from _named(value, dotted)
        elif isinstance(value, list):
            yield from _named({str(number): item for number, item in enumerate(value)}, dotted)
        elif isinstance(value, str) and _is_path(key, value):
            base = values.get("path")
            inside = key == "images" and isinstance(base, str) and not value.startswith(("/", "~"))
            yield dotted.removeprefix("recipe."), f"{base}/{value}" if inside else value


def _is_path(key: str, value: str) -> bool:
    if key == "recipe":
        return Path(value).suffix == ".toml"
    if key == "labels":
        return value not in LABEL_WORDS
    return key in PATH_KEYS or (key in FILE_KEYS and ("/" in value or value.startswith("~")))

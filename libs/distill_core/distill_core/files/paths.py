"""Paths as people type them, and URLs made of paths. A path is taken as it is: no character of it is a pattern."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from distill_core.errors import ConfigError


def user_path(text: str | Path, *, field: str = "path") -> Path:
    """`text` as a path, `~` and `~name` at its beginning being home folders where there are such.

    Raises:
        ConfigError: it holds a character that no path may have.
    """
    if "\0" in str(text):
        raise ConfigError(f"{field} {str(text)!r} holds a zero character, which no path does", field=field)
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody is called so, or has no home
        return Path(text)


def there(path: Path) -> bool:
    """Whether `path` is a file or folder that this process can see; a name too long for one is not."""
    try:
        return path.exists()
    except OSError:
        return False


def files_below(path: Path) -> Iterator[tuple[str, Path]]:
    """The files at or below `path`, hidden ones apart, in order, each with its name in there."""
    if path.is_file():
        yield path.name, path
        return
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            yield Path(root, name).relative_to(path).as_posix(), Path(root, name)


def looks_like_path(text: str) -> bool:
    """Whether text can only be meant as a path: it is absolute, begins at home or here, or climbs."""
    return text.startswith(("/", "~", "./")) or ".." in Path(text).parts


def check_readable(key: str, name: str, roots: Sequence[Path], *, recipe: bool = False) -> None:
    """Refuse a path that a job names outside the data `roots`; `recipe`: it is a recipe, which no job may bring along.

    Raises:
        ConfigError: `field` is `key`.
    """
    if recipe:
        raise ConfigError(
            f"{key} = {name!r} is a file: a job names recipes that come with the library", field=key
        )
    # resolve() follows links, so that one inside a root cannot lead out of it
    where = user_path(name, field=key).resolve()
    if not Path(name).is_absolute() or not any(where.is_relative_to(root) for root in roots):
        raise ConfigError(f"{key} = {name!r} may not be read by a job: {_allowed(roots)}", field=key)


def _allowed(roots: Sequence[Path]) -> str:
    if not roots:
        return "no folder is open to jobs; the operator names some in DISTILLERY_DATA_ROOTS"
    return f"give an absolute path under {', '.join(map(str, roots))} (DISTILLERY_DATA_ROOTS)"


def url_of(scheme: str, path: Path | str) -> str:
    """The URL of an absolute path; what has a meaning in URLs (`?`, `#`, `%`, `@`, spaces …) is escaped."""
    return f"{scheme}://{quote(str(path))}"


def path_of(url: str, scheme: str) -> Path:
    """The path that `url_of` made `url` of."""
    return Path(unquote(url.removeprefix(f"{scheme}://")))

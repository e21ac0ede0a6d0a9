"""Paths as people type them, and URLs made of paths. A path is taken as it is: no character of it is a pattern."""

from __future__ import annotations

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


def url_of(scheme: str, path: Path | str) -> str:
    """The URL of an absolute path; what has a meaning in URLs (`?`, `#`, `%`, `@`, spaces …) is escaped."""
    return f"{scheme}://{quote(str(path))}"


def path_of(url: str, scheme: str) -> Path:
    """The path that `url_of` made `url` of."""
    return Path(unquote(url.removeprefix(f"{scheme}://")))

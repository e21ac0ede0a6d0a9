"""Text files that people write: UTF-8, with or without a byte order mark, lines ended as any editor ends them."""

from __future__ import annotations

import re
from pathlib import Path

UTF8 = "utf-8-sig"  # reads both: editors on Windows begin a file with a byte order mark
_END = re.compile(r"\r\n|\r|\n")
_MARK = "\ufeff"


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is not UTF-8.
    """
    return path.read_text(encoding=UTF8)


def lines(text: str) -> list[str]:
    r"""The lines of `text`, without their ends: \n, \r\n or \r, and nothing else.

    `str.splitlines` also ends a line at U+2028, U+2029, U+0085, \v, \f and \x1c to \x1e, which may stand inside a
    prompt, a caption or a JSON text. A byte order mark that begins a line, as in files put together, is left out.
    """
    parts = _END.split(text)
    return [part.removeprefix(_MARK) for part in (parts if parts[-1] else parts[:-1])]

"""The consoles that all output passes through: what is printed is data, whoever chose the words."""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

FILE_WIDTH = 180  # of tables that go into a file or a pipe
JOINERS = "\u200c\u200d"  # format characters that belong to words and emoji
TYPOGRAPHY = {"…": "...", "·": "-", "×": "x", "→": "->", "–": "-", "—": "-", "’": "'", "“": '"', "”": '"'}
TYPOGRAPHY |= {"━": "-", "╸": "-", "╺": "-"}  # a bar of progress


def shown(text: str, *, lines: bool = True) -> str:
    """`text` without what steers a terminal: escapes, directions and line separators become visible, as in Python.

    With `lines`, ends of lines and tabs stay.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(one if one in kept or _is_plain(one) else escape(one) for one in text)


def _is_plain(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS


def escape(character: str) -> str:
    r"""The character as an escape; a byte of a file name that is no text, as that byte, `\xff`."""
    code = ord(character)
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(
        character, f"\\x{byte:02x}" if byte < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def styled(*parts: str | tuple[str, str]) -> Text:
    """Words, each plain or with a style, as in `styled("it ", ("holds", "green"))`."""
    pairs = ((part, "") if isinstance(part, str) else part for part in parts)
    return Text.assemble(*((shown(words), style) for words, style in pairs))


class Printer(Console):
    """A console to which every string is data: no markup, no emoji codes, and no line that is broken by force."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """All strings of a print, a table or a panel come through here."""
        return super().render_str(shown(text), **{**options, "markup": False, "emoji": False})


notes = Printer(stderr=True)
results = Printer(width=None if sys.stdout is not None and sys.stdout.isatty() else FILE_WIDTH)


def speak_any_encoding() -> None:
    """From now on, a character that the output's encoding has no byte for is replaced, and never an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="distillery")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(TYPOGRAPHY.get(one) or escape(one) for one in wrong), error.end


codecs.register_error("distillery", _replaced)


def json_text(text: str) -> str:
    """JSON with everything escaped that steers a terminal or that stdout cannot encode; its values are the same."""
    encoding = getattr(results.file, "encoding", None) or "utf-8"
    return re.sub(r"[^ -~]", lambda one: one[0] if _fits(one[0], encoding) else _json_escape(one[0]), text)


def _fits(character: str, encoding: str) -> bool:
    if not _is_plain(character):
        return False
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))

"""Values of what people type for labels, times and sweeps; each mistake is one sentence."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

from distill_core.errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
_AGE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_.@/+-]+")  # a text that needs no quotes in a sweep
_PAIRS = {"[": "]", "{": "}"}


def parse_labels(items: Iterable[str]) -> dict[str, str]:
    """`["team=images"]` as a dictionary.

    Raises:
        ConfigError: not KEY=VALUE, or a key twice.
    """
    labels: dict[str, str] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"label {item[:80]!r} is not KEY=VALUE, e.g. team=images", field="label")
        if key in labels:
            raise ConfigError(f"label {key[:64]!r} is given twice", field="label")
        labels[key] = value
    return labels


def parse_age(text: str, field: str) -> float:
    """`90s`, `30m`, `12h`, `30d` or `2w` in seconds.

    Raises:
        ConfigError: not of that form.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{field} {text[:40]!r} is not an age such as 90s, 30m, 12h, 30d or 2w", field=field
        )
    return float(match[1]) * _UNITS[match[2]]


def parse_moment(text: str, field: str) -> datetime | None:
    """An age before now, or a date and time (here's, if it names no zone); None for "".

    Raises:
        ConfigError: neither.
    """
    if not text:
        return None
    try:
        if _AGE.fullmatch(text.strip()):
            return datetime.now(UTC) - timedelta(seconds=parse_age(text, field))
        moment = datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{field} {text[:40]!r} is neither an age such as 12h or 30d nor a date such as 2026-05-31T08:00",
            field=field,
        ) from None
    return moment


def split_sweep(
    overrides: Iterable[str],
    marked: Iterable[str] = (),
    *,
    is_value: Callable[[str, str], bool] = lambda key, text: False,
) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides with one value as they are, and `KEY=A,B,…` as the key's values.

    Commas inside brackets and quotes do not separate. What is `marked` is a sweep; of the other overrides only what
    no value of its key could be: `is_value` says of a key and a text with commas whether it is one.

    Raises:
        ConfigError: an empty value, a key twice, or a text that needs quotes.
    """
    single: list[str] = []
    axes: dict[str, list[str]] = {}
    for item, is_marked in [*((item, False) for item in overrides), *((item, True) for item in marked)]:
        key, separator, text = (part.strip() for part in item.partition("="))
        if is_marked and not (key and separator):
            raise ConfigError(f"sweep {item[:80]!r} is not KEY=A,B,…, e.g. seed=1,2", field="sweep")
        values = _parts(text) if separator else []
        if not is_marked and (len(values) < 2 or (not all(map(_is_quoted, values)) and is_value(key, text))):
            single.append(item)
            continue
        if key in axes:
            raise ConfigError(f"key {key[:64]!r} is given twice", field="set")
        axes[key] = [_value(key, value) for value in values]
    return single, axes


def _parts(text: str) -> list[str]:
    """`text` cut at its outermost commas."""
    parts, closing, quote, begun = [], [], "", 0
    for place, character in enumerate(text):
        if quote:
            escaped = quote == '"' and text[:place].endswith("\\") and not text[:place].endswith("\\\\")
            quote = "" if character == quote and not escaped else quote
        elif character in "\"'":
            quote = character
        elif character in _PAIRS:
            closing.append(_PAIRS[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == "," and not closing:
            parts.append(text[begun:place])
            begun = place + 1
    return [*parts, text[begun:]]


def _is_quoted(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] in "\"'"


def _value(key: str, text: str) -> str:
    value = text.strip()
    if _WORD.fullmatch(value) or _is_toml(value):
        return value
    raise ConfigError(
        f"{key[:64]} = …{value[:40]!r}… is no value of a sweep; put a text that holds spaces or commas in quotes, "
        f"e.g. -s '{key[:64]}=\"one, two\"'",
        field="set",
    )


def _is_toml(value: str) -> bool:
    try:
        parsed = tomllib.loads(f"v = {value}\n")
    except (tomllib.TOMLDecodeError, RecursionError):
        return False
    return list(parsed) == ["v"] and not (isinstance(parsed["v"], float) and not math.isfinite(parsed["v"]))

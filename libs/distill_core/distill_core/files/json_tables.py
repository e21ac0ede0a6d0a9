"""JSON files that hold one table: configs of models, indices, captures. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_table(path: Path) -> dict[str, Any]:
    """The table in the JSON file at `path`, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read. ValueError: it is not UTF-8 or not JSON, nested too deeply, or no table.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not a table")
    return values

"""Bounds of the numbers in a foreign config, checked before a library builds what they describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError
from distill_core.files.json_tables import read_table

FILES = ("config.json", "scheduler_config.json")
MOST = 10**6  # the largest vocabularies have a quarter of it
MOST_LAYERS = 1000  # of keys such as num_layers: each takes a library milliseconds


def check_numbers(folder: Path) -> None:
    """Refuse a config with a number that would keep a library building for hours; what it is silent on passes.

    Raises:
        ArtifactError: such a number; the sentence names its key.
    """
    for path in (folder / name for name in FILES):
        try:
            table = read_table(path)
        except (OSError, ValueError):  # for whoever reads it to say
            continue
        for key, number in _numbers(table):
            most = MOST_LAYERS if "layers" in key else MOST
            if abs(number) > most:
                raise ArtifactError(f"{path} is damaged: {key} is above {most}, the most that is read")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers with the key that they stand under, however deep."""
    waiting = [(key, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, inner) for inner in value)
        elif isinstance(value, int):
            yield key, value

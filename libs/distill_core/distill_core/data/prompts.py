"""Prompts from where people keep them: text files, and captions beside pictures (`a.txt` by `a.png`, metadata)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from distill_core.data.source import existing
from distill_core.errors import DataError
from distill_core.files.text import lines, read_text

MAX_PROMPT_FILE = 64 * 2**20  # bytes
MAX_PROMPT = 4096  # characters
METADATA = ("metadata.jsonl", "metadata.csv")  # as in Hugging Face's folders of pictures
CAPTION_COLUMN = "text"


def checked_prompts(
    values: Iterable[Any], *, what: str, field: str, remedy: str = "repair or remove it"
) -> list[str]:
    """The values as prompts, spaces around them removed.

    Raises:
        DataError: none at all, or one that is no text, empty or too long; the message names `what` and the item.
    """
    prompts = []
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            problem = (
                "empty" if value is None or isinstance(value, str) else f"a {type(value).__name__}, no text"
            )
            raise DataError(f"item {number} of {what} is {problem}; {remedy}", field=field)
        if len(value) > MAX_PROMPT:
            raise DataError(f"item {number} of {what} is longer than {MAX_PROMPT} characters", field=field)
        prompts.append(value.strip())
    if not prompts:
        raise DataError(f"{what} holds no prompt; give at least one", field=field)
    return prompts


def read_lines(path: str) -> list[str]:
    """The prompts of a text file, one per line; empty lines are left out."""
    prompts = [line.strip() for line in lines(_text(existing(path), MAX_PROMPT_FILE))]
    for number, line in enumerate(prompts, start=1):
        if len(line) > MAX_PROMPT:
            raise DataError(
                f"line {number} of {path} is longer than {MAX_PROMPT} characters", field="data.path"
            )
    return checked_prompts(filter(None, prompts), what=path, field="data.path")


def captions(root: Path, pictures: Sequence[Path]) -> list[str] | None:
    """The caption of each picture: from metadata files under `root`, else from text files; None if there are none.

    Raises:
        DataError: some pictures have captions and one has not, or a caption cannot be used; the message names it.
    """
    texts = _from_metadata(root)
    if not texts:
        beside = [picture.with_suffix(".txt") for picture in pictures]
        texts = {  # of any length in the file, of one line here
            picture.relative_to(root): " ".join(
                filter(None, map(str.strip, lines(_text(file, 4 * MAX_PROMPT))))
            )
            for picture, file in zip(pictures, beside)
            if file.is_file()
        }
    if not texts:
        return None
    names = [picture.relative_to(root) for picture in pictures]
    missing = next((name for name in names if name not in texts), None)
    if missing is not None:
        raise DataError(
            f"picture {missing} of {root} has no caption where others have; write {missing.stem}.txt beside it or "
            "add it to the metadata, or set data.captions = 'none'",
            field="data.captions",
        )
    what, remedy = f"the captions in {root}", "write it, or set data.captions = 'none'"
    return checked_prompts((texts[name] for name in names), what=what, field="data.captions", remedy=remedy)


def _from_metadata(root: Path) -> dict[Path, str]:
    """Captions by the picture's path under `root`, from every metadata file that has a column of them."""
    texts: dict[Path, str] = {}
    for file in sorted(file for name in METADATA for file in root.rglob(name)):
        for number, row in enumerate(_rows(file), start=1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise DataError(
                    f"row {number} of {file} has no file_name; each row names its picture",
                    field="data.captions",
                )
            if CAPTION_COLUMN in row:
                name = os.path.normpath(file.parent.relative_to(root) / row["file_name"])
                texts[Path(name)] = row[CAPTION_COLUMN]
    return texts


def _rows(file: Path) -> list[Any]:
    text = _text(file, MAX_PROMPT_FILE)
    try:
        if file.suffix == ".csv":
            return list(csv.DictReader(StringIO(text, newline=""), strict=True))
        return [json.loads(line) for line in lines(text) if line.strip()]
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{file} cannot be read as {file.suffix[1:]}: {error}", field="data.captions"
        ) from None


def _text(file: Path, limit: int) -> str:
    if not file.is_file() or file.stat().st_size > limit:
        raise DataError(f"{file} is not a text file of at most {limit} bytes", field="data.path")
    try:
        return read_text(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}", field="data.path") from None

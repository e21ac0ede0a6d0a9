"""A folder of pictures: all in one folder (no labels), or one sub-folder per class; with captions if there are."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.config import DataPath
from distill_core.data.classes import Renaming
from distill_core.data.damaged import Skipping
from distill_core.data.pictures import SUFFIXES, EncodedPixels
from distill_core.data.prompts import captions
from distill_core.data.source import PICKLE_SUFFIXES, Source, existing
from distill_core.errors import DataError

log = logging.getLogger(__name__)


class ImageFolder(Source):
    """Pictures in the order of their paths; classes in the order of their folders' names."""

    class Config(Renaming, Skipping):
        """Options of the recipe's `[data]` table."""

        name: Literal["images"] = "images"
        path: DataPath
        size: int | None = Field(None, ge=1, le=4096)  # scale the shorter side to it, then crop the centre
        channels: Literal[1, 3] | None = None  # unset: as the first picture
        labels: Literal["auto", "folder", "none"] = (
            "auto"  # auto: sub-folders are classes where there are any
        )
        captions: Literal["auto", "none"] = (
            "auto"  # auto: a.txt beside a.png, or metadata.jsonl or .csv (file_name, text), where there are any
        )
        limit: int | None = Field(None, ge=1)  # only this many, spread evenly over the folder

    def __init__(self, config: Config) -> None:
        root = existing(config.path)
        if not root.is_dir():
            raise DataError(
                f"data path {root} is a file; the images source reads a folder", field="data.path"
            )
        files, classes = _pictures(root, config.labels)
        labels = _labels(root, files, classes) if classes else None
        if config.limit is not None and config.limit < len(files):
            chosen = torch.arange(config.limit) * len(files) // config.limit
            files = [files[index] for index in chosen.tolist()]
            labels = None if labels is None else labels[chosen]
        prompts = captions(root, files) if config.captions == "auto" else None
        pixels = EncodedPixels(
            lambda index: (files[index], str(files[index])),
            len(files),
            size=config.size,
            channels=config.channels,
            skip_damaged=config.skip_damaged,
        )
        super().__init__(
            config,
            size=len(pixels),
            pixels=pixels,
            labels=None if labels is None else labels[pixels.readable],
            class_names=config.renamed(classes),
            prompts=None if prompts is None else [prompts[index] for index in pixels.readable.tolist()],
        )
        self._files = [files[index] for index in pixels.readable.tolist()]

    def _identities(self) -> list[tuple[str, int]]:
        root = existing(self.config.path)  # type: ignore[attr-defined]
        return [(file.relative_to(root).as_posix(), file.stat().st_size) for file in self._files]


OTHER_PICTURES = frozenset(
    (
        ".gif",
        ".jfif",
        ".jif",
        ".jpe",
        ".jp2",
        ".jxl",
        ".avif",
        ".heic",
        ".heif",
        ".svg",
        ".psd",
        ".tga",
        ".ico",
    )
    + (".ppm", ".pgm", ".pbm", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".arw")
)  # suffixes of pictures that are not read


def _left_out(root: Path) -> str:
    """The pictures under `root` that are not read, by suffix and number: "3 .gif, 1 .jfif", or nothing."""
    visible = (file for file in root.rglob("*") if not _is_hidden(file, root))
    suffixes = Counter(suffix for file in visible if (suffix := file.suffix.lower()) in OTHER_PICTURES)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def _pictures(root: Path, labels: str) -> tuple[list[Path], list[str]]:
    """The picture files, and the classes if sub-folders are classes."""
    files = sorted(file for file in root.rglob("*") if _is_picture(file, root))
    loose = [file for file in files if file.parent == root]
    if not files:
        raise DataError(_nothing_found(root), field="data.path")
    if left_out := _left_out(root):
        log.warning("%s: %s left out; read are %s, so convert them", root, left_out, ", ".join(SUFFIXES))
    if labels == "none" or (labels == "auto" and len(loose) == len(files)):
        return files, []
    if loose:
        raise DataError(
            f"{root} holds pictures such as {loose[0].name} beside sub-folders of pictures; "
            "set data.labels to 'none', or move them into a class folder",
            field="data.labels",
        )
    classes = sorted({file.relative_to(root).parts[0] for file in files})
    empty = sorted(_visible_folders(root) - set(classes))
    if empty:
        raise DataError(
            f"class folder {root / empty[0]} holds no pictures; fill or remove it", field="data.path"
        )
    return files, classes


def _labels(root: Path, files: list[Path], classes: list[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[file.relative_to(root).parts[0]] for file in files], dtype=torch.int64)


def _is_picture(file: Path, root: Path) -> bool:
    return not _is_hidden(file, root) and file.suffix.lower() in SUFFIXES and file.is_file()


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _visible_folders(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


def _nothing_found(root: Path) -> str:
    pickles = sorted(file.name for file in root.rglob("*") if file.suffix.lower() in PICKLE_SUFFIXES)
    message = f"folder {root} holds no pictures ({', '.join(SUFFIXES)})"
    if pickles:
        return f"{message}; {pickles[0]} is refused because such files can execute code when read"
    if left_out := _left_out(root):
        return f"{message}, and {left_out} are not read; convert them to one of these"
    return f"{message}; give a folder with pictures, or with one sub-folder per class"


SOURCES = {"images": ImageFolder}

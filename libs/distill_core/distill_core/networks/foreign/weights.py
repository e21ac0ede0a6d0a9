"""Choice of a foreign part's weight files: safetensors, of the one variant that there is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill_core.errors import ArtifactError, NotFound

_PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")
_BEGINNINGS = {b"\x80": "a pickle", b"PK\x03\x04": "a zip of pickles, as torch.save writes"}
_SHARD = r"(?:-\d+-of-\d+)?"


def variant_of(folder: Path, stem: str) -> str | None:
    """The variant to ask a library for, e.g. fp16 where only `<stem>.fp16.safetensors` is there; None: the plain files.

    Raises:
        ArtifactError: no safetensors of that name, or several variants and no plain files.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = re.compile(rf"{re.escape(stem)}{_SHARD}\.safetensors")
    if any(plain.fullmatch(file.name) for file in files):
        return None
    named = re.compile(rf"{re.escape(stem)}\.([A-Za-z0-9_]+){_SHARD}\.safetensors")
    variants = sorted({match[1] for file in files if (match := named.fullmatch(file.name))})
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise ArtifactError(
            f"{folder} holds the variants {', '.join(variants)} of its weights and no {stem}.safetensors; keep one"
        )
    held = [file.name for pattern in ("*.safetensors", *_PICKLED) for file in sorted(folder.glob(pattern))]
    if held and held[0].endswith(".safetensors"):
        raise ArtifactError(f"{folder} holds {held[0]} and no {stem}.safetensors; rename it")
    weights = held[0] if held else "no weights"
    raise ArtifactError(
        f"{folder} holds {weights}: only safetensors are loaded, since pickles can execute code"
    )


@contextlib.contextmanager
def opened_safetensors(file: Path) -> Iterator[Any]:
    """A safetensors file whose header was read; what is not asked for of its tensors is not.

    Raises:
        NotFound: no such file. ArtifactError: a pickle, whatever its name says, or damaged.
    """
    if not file.is_file():
        raise NotFound(f"file {file} does not exist", field="path")
    with file.open("rb") as stream:
        begins = stream.read(4)
    held = next((what for mark, what in _BEGINNINGS.items() if begins.startswith(mark)), None)
    if held is not None and not _is_safetensors(file):
        raise ArtifactError(f"{file} is {held}: only safetensors are loaded, since pickles can execute code")
    if file.suffix != ".safetensors":
        raise ArtifactError(
            f"{file} is no .safetensors file: only those are loaded, since pickles can execute code"
        )
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ArtifactError(f"{file} is damaged or no safetensors file: {error}") from None


def _is_safetensors(file: Path) -> bool:
    """Whether a file that begins as a pickle does is one of safetensors: a header of 128 bytes begins so too."""
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and the words of its header.

    Raises:
        NotFound: no such file. ArtifactError: a pickle, whatever its name says, or damaged.
    """
    with opened_safetensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118

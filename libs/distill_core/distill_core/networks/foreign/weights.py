"""Choice of a foreign part's weight files: safetensors, of the one variant that there is."""

from __future__ import annotations

import re
from pathlib import Path

from distill_core.errors import ArtifactError

_PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")
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

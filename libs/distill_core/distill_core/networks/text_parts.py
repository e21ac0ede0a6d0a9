"""Tokenizers and text models of foreign folders, read strictly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill_core.errors import ArtifactError
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.foreign.texts import CLIP, check_text_model, check_tokenizer
from distill_core.networks.foreign.weights import variant_of
from distill_core.networks.foreign_configs import check_numbers

FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
"""Files of which one set holds a vocabulary."""


def load_tokenizer(folder: Path, kind: str = CLIP) -> Any:
    """The tokenizer of a folder; `kind` is one of `foreign.texts.TOKENIZERS`."""
    import transformers

    known = FILES if kind != CLIP else FILES[:2]
    if not any(all((folder / name).is_file() for name in names) for names in known):
        wanted = " nor ".join(" with ".join(names) for names in known)
        raise OSError(f"{folder.name}/ has neither {wanted}")  # it would read every word as unknown
    check_tokenizer(folder, kind)
    cls: Any = transformers.CLIPTokenizer if kind == CLIP else transformers.AutoTokenizer
    return cls.from_pretrained(folder, local_files_only=True)


def load_text_model(folder: Path, name: str = "CLIPTextModel") -> Any:
    """A text model of transformers' class `name` in float32, whatever its weights are kept in."""
    import transformers

    cls: Any = getattr(transformers, name)
    check_numbers(folder)
    check_text_model(folder, cls)
    if is_faked():
        return cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    variant = variant_of(folder, "model")
    return cls.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, variant=variant, dtype=torch.float32
    )


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Whatever transformers raises on damaged files, as a sentence."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"text encoder or tokenizer in {folder} is damaged or incomplete: {reason}"
        ) from error

"""A scene's folder: config.json says what it is, model.safetensors holds its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Described = TypeVar("Described", bound=Config)
Made = TypeVar("Made")


def write_scene(folder: Path, described: Config, tensors: Mapping[str, Tensor]) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(described.model_dump_json(indent=1), encoding="utf-8")


def read_description(
    folder: Path, cls: type[Described], make: Callable[[Described], Made], *, what: str
) -> tuple[Described, Made]:
    """Content of config.json, and the object that `make` builds from it.

    Raises:
        ArtifactError: the file is missing or damaged, or `make` refuses it; `what` is what it should describe.
    """
    path = folder / CONFIG
    try:
        described = cls.parse(read_table(path))
        return described, make(described)
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{path} does not describe {what}: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by name.

    Raises:
        ArtifactError: the file is missing or damaged, or holds NaN or infinity.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is missing or damaged: {error}") from None
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ArtifactError(f"{path} holds NaN or infinity; train the scene again")
    return tensors


def fill(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put `tensors` into `module`, which `folder` describes.

    Raises:
        ArtifactError: they are those of another module.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{folder / WEIGHTS} is not what {CONFIG} describes: {reason}") from None

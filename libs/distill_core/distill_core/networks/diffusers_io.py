"""Denoisers from diffusers folders, ours or any other's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.files.json_tables import read_table
from distill_core.networks.denoiser import loading
from distill_core.networks.diffusers_adapted import load_adapted
from distill_core.networks.diffusers_codec import check_codec
from distill_core.networks.diffusers_denoiser import SIDECAR, DiffusersDenoiser, Sidecar
from distill_core.networks.diffusers_fit import check_fit, derived_sidecar
from distill_core.networks.fake_tensors import is_faked, real_tensors
from distill_core.networks.families import FAMILIES
from distill_core.networks.foreign.index import Index, check_parts, read_index
from distill_core.networks.foreign.keys import Keys, check_keys, defaults_of
from distill_core.networks.foreign.networks import CODECS, NETWORKS
from distill_core.networks.foreign.schedulers import SCHEDULERS
from distill_core.networks.foreign.weights import variant_of
from distill_core.networks.foreign_configs import check_numbers
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.scalar_conditions import load_scalars
from distill_core.networks.text import load_text_encoder

SLOTS = ("unet", "transformer")
CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"  # stem of diffusers' weight files


def load_companions(folder: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The frozen decoder and text encoder of a folder, None for each that it lacks."""
    companions: dict[str, Any] = {"codec": None, "text": None}
    slots = [slot for slot in ("vae", "vqvae") if (folder / slot).is_dir()]
    if len(slots) > 1:
        raise ArtifactError(f"{folder} has both vae/ and vqvae/; keep the one that decodes its latents")
    if slots and not (folder / slots[0] / CONFIG).is_file():
        raise ArtifactError(
            f"{folder} lacks {slots[0]}/{CONFIG}, and with it the decoder of its latents; copy it there"
        )
    if slots:
        codec = _load(folder / slots[0], _class_named(folder / slots[0], CODECS))
        companions["codec"] = codec.eval().requires_grad_(False).to(device)
    if (folder / "text_encoder" / CONFIG).is_file():
        companions["text"] = _load_text(folder).to(device)
    return companions


def _load_text(folder: Path) -> PromptEncoder:
    """The encoder that the folder's network, or its experts, read; Stable Diffusion's where it has none."""
    inside = (folder, *sorted(folder.glob("experts/*")))
    slots = [place / slot for place in inside for slot in SLOTS if (place / slot / CONFIG).is_file()]
    if not slots:
        return load_text_encoder(folder)
    config = _table(slots[0] / CONFIG, "cannot be read as a diffusers config")
    return FAMILIES[_class_name(slots[0], NETWORKS)].load_text(folder, config)


@loading()
def load_denoiser(
    folder: Path, *, device: torch.device | str = "cpu", companions: dict[str, Any] | None = None
) -> DiffusersDenoiser:
    """A denoiser from a diffusers folder, ours or any other's; `companions` given take the place of its own.

    Raises:
        NotFound: no such folder. ArtifactError: not a supported diffusers folder, damaged, or pickled weights.
    """
    if not folder.is_dir():
        raise NotFound(f"model folder {folder} does not exist", field="path")
    slot = next((name for name in SLOTS if (folder / name / CONFIG).is_file()), None)
    if slot is None:
        raise ArtifactError(
            f"{folder} is not a diffusers folder: it has neither unet/config.json nor transformer/config.json"
        )
    index = read_index(folder)
    network = _load(folder / slot, _class_named(folder / slot, NETWORKS))
    scheduler = _load(folder / "scheduler", _scheduler_class(folder / "scheduler", index))
    shared = companions or load_companions(folder)
    sidecar = read_sidecar(folder)
    try:
        beside = 0 if sidecar is None else sidecar.beside
        check_fit(folder / slot / CONFIG, network, scheduler, **shared, beside=beside)
        sidecar = sidecar or derived_sidecar(folder / slot / CONFIG, network, scheduler, index, **shared)
        if shared["text"] is not None and sidecar.cond.max_tokens:
            shared["text"].read_tokens(sidecar.cond.max_tokens)
        denoiser = DiffusersDenoiser(network, scheduler, sidecar, **shared)
        if sidecar.scalars:
            load_scalars(network, sidecar.scalars, folder)
        if sidecar.adapters:
            denoiser = load_adapted(denoiser, sidecar.adapters, folder)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder} is damaged: its settings do not fit together: {_reason(error)}"
        ) from error
    if index is not None and companions is None:
        check_parts(folder, index)
    return denoiser.to_device(device)


def _class_named(folder: Path, known: Mapping[str, Keys]) -> Any:
    return getattr(diffusers, _class_name(folder, known))


def _class_name(folder: Path, known: Mapping[str, Keys]) -> str:
    name = str(_table(folder / CONFIG, "cannot be read as a diffusers config").get("_class_name"))
    if name not in known:
        raise ArtifactError(f"{folder} holds a {name}, which is not supported; known: {', '.join(known)}")
    return name


def _scheduler_class(folder: Path, index: Index | None) -> Any:
    """The class that a pipeline's index names, which diffusers builds from the config of whichever other."""
    config = _table(folder / SCHEDULER_CONFIG, "cannot be read as a diffusers config")
    name = index.parts.get("scheduler") if index is not None else None
    name = name or str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise ArtifactError(
            f"{folder} holds a {name}, which is no scheduler that is understood; known: {', '.join(SCHEDULERS)}"
        )
    return getattr(diffusers, name)


def _table(path: Path, otherwise: str) -> dict[str, Any]:
    """The table in a JSON file; what an error says of any other file."""
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} {otherwise}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _load(folder: Path, cls: Any) -> Any:
    """A part of class `cls`, in float32 whatever its weights are kept in."""
    check_numbers(folder)
    _check_config(folder, cls)
    if is_faked():
        return _shaped(folder, cls)
    options: dict[str, Any] = {}
    if issubclass(cls, nn.Module):
        variant = variant_of(folder, WEIGHTS)
        options = {"use_safetensors": True, "variant": variant, "torch_dtype": torch.float32}
    try:
        loaded = cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # safetensors, json and diffusers each raise their own kinds on damaged files
        raise ArtifactError(f"{folder} is damaged or incomplete: {_reason(error)}") from error
    if isinstance(loaded, nn.Module):  # what a file lacks is left without memory
        lacking = next((name for name, value in loaded.named_parameters() if value.is_meta), None)
        if lacking is not None:
            raise ArtifactError(f"{folder} is incomplete: its weights lack {lacking}")
    return loaded


def _check_config(folder: Path, cls: Any) -> None:
    """Refuse what `cls` would drop, or this package would."""
    name = cls.__name__
    path = folder / (SCHEDULER_CONFIG if name in SCHEDULERS else CONFIG)
    config, defaults = _table(path, "cannot be read as a diffusers config"), defaults_of(cls)
    check_keys(path, config, {**NETWORKS, **CODECS, **SCHEDULERS}[name], defaults)
    if name in CODECS:
        check_codec(path, {**defaults, **config})


def _shaped(folder: Path, cls: Any) -> Any:
    """A network of the folder's config without its weights; a scheduler for real."""
    if not issubclass(cls, nn.Module):
        with real_tensors():
            return _load(folder, cls)
    try:
        return cls.from_config(cls.load_config(folder, local_files_only=True))
    except Exception as error:
        raise ArtifactError(f"{folder} is damaged or incomplete: {error}") from error


def read_sidecar(folder: Path) -> Sidecar | None:
    """A folder's `distillery.json`; None if it has none."""
    path = folder / SIDECAR
    if not path.is_file():
        return None
    try:
        return Sidecar.parse(_table(path, "is damaged"))
    except ConfigError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None

"""Denoisers from diffusers folders, ours or any other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.diffusion.schedule import Parameterisation
from distill_core.errors import ArtifactError, ConfigError, NotFound
from distill_core.networks.denoiser import loading
from distill_core.networks.diffusers_denoiser import SIDECAR, DiffusersDenoiser, Sidecar, schedule_of
from distill_core.networks.foreign_configs import check_numbers
from distill_core.networks.text import TextEncoder, check_text, load_text_encoder
from distill_core.networks.weightless import is_weightless, real_tensors

NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


def load_companions(folder: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The frozen decoder and text encoder of a folder, None for each that it lacks."""
    companions: dict[str, Any] = {"codec": None, "text": None}
    if (folder / "vae" / "config.json").is_file():
        codec = _load(folder / "vae", diffusers.AutoencoderKL, use_safetensors=True)
        companions["codec"] = codec.eval().requires_grad_(False).to(device)
    if (folder / "text_encoder" / "config.json").is_file():
        companions["text"] = load_text_encoder(folder).to(device)
    return companions


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
    slot = next((name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()), None)
    if slot is None:
        raise ArtifactError(
            f"{folder} is no diffusers folder: it has neither unet/config.json nor transformer/config.json"
        )
    network = _load(folder / slot, _class_named(folder / slot), use_safetensors=True)
    scheduler = _load(folder / "scheduler", _class_named(folder / "scheduler", "scheduler_config.json"))
    shared = companions or load_companions(folder)
    sidecar = read_sidecar(folder)
    try:
        sidecar = sidecar or _derived_sidecar(network, scheduler, **shared)
        denoiser = DiffusersDenoiser(network, scheduler, sidecar, **shared)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder} is damaged: its settings do not fit together: {_reason(error)}"
        ) from error
    return denoiser.to_device(device)


def _class_named(folder: Path, config: str = "config.json") -> Any:
    name = _table(folder / config, "cannot be read as a diffusers config").get("_class_name")
    if config == "config.json" and str(name) not in NETWORKS:
        raise ArtifactError(f"{folder} holds a {name}, which is not supported; known: {', '.join(NETWORKS)}")
    found = getattr(diffusers, str(name), None)
    if config != "config.json" and not (
        isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)
    ):
        raise ArtifactError(
            f"{folder} holds a {name}, which is no scheduler of diffusers"
        )  # nor a whole pipeline
    return found


def _table(path: Path, otherwise: str) -> dict[str, Any]:
    """The table in a JSON file; what an error says of any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} {otherwise}: {_reason(error)}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} {otherwise}: it holds no table")
    return found


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _load(folder: Path, cls: Any, **options: Any) -> Any:
    check_numbers(folder)
    if is_weightless():
        return _shaped(folder, cls, **options)
    weights = [
        file for pattern in ("*.safetensors", "*.bin", "*.ckpt", "*.pt") for file in folder.glob(pattern)
    ]
    if options.get("use_safetensors") and not any(file.suffix == ".safetensors" for file in weights):
        held = weights[0].name if weights else "no weights"
        raise ArtifactError(
            f"{folder} holds {held}: only safetensors are loaded, since pickles can execute code"
        )
    try:
        loaded = cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # safetensors, json and diffusers each raise their own kinds on damaged files
        raise ArtifactError(f"{folder} is damaged or incomplete: {_reason(error)}") from error
    if isinstance(loaded, nn.Module):  # what a file lacks is left without memory
        lacking = next((name for name, value in loaded.named_parameters() if value.is_meta), None)
        if lacking is not None:
            raise ArtifactError(f"{folder} is incomplete: its weights lack {lacking}")
    return loaded


def _shaped(folder: Path, cls: Any, *, use_safetensors: bool = False) -> Any:
    """A network of the folder's config without its weights; a scheduler for real."""
    if not use_safetensors:
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


def _derived_sidecar(network: Any, scheduler: Any, codec: Any, text: TextEncoder | None) -> Sidecar:
    config, schedule = network.config, schedule_of(scheduler)
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    factor = 2 ** (len(codec.config.block_out_channels) - 1) if codec is not None else 1
    colours = codec.config.out_channels if codec is not None else config.in_channels
    sigma_max = min(schedule.sigma_max, 80.0)
    return Sidecar(
        image=ImageSpec(
            channels=config.in_channels,
            height=size,
            width=size,
            picture=(colours, size * factor, size * factor),
        ),
        cond=_derived_cond(network, text),
        sampler=SamplerSpec(
            kind="euler",
            sigma_min=max(schedule.sigma_min, 0.002),
            sigma_max=sigma_max,
            noise_scale=schedule.start_scale(sigma_max),
            num_steps=30,
            max_steps=1000,
            guidance=7.5 if text is not None else 1.0,
        ),
        parameterisation=_parameterisation_of(scheduler),
    )


def _derived_cond(network: Any, text: TextEncoder | None) -> CondSpec:
    config = network.config
    if text is not None:
        check_text(config, text)
        return CondSpec(
            kind="prompt",
            max_tokens=text.max_tokens,
            embed_dim=config.cross_attention_dim,
            pooled_dim=text.pooled_dim,
        )
    if isinstance(network, diffusers.UNet2DConditionModel):
        raise ArtifactError("this network is conditioned on text, and its folder has no text_encoder/")
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if not classes:
        return CondSpec(kind="none")
    null = classes if config.get("num_embeds_ada_norm") else None
    return CondSpec(kind="class_label", num_classes=classes, null_label=null)


def _parameterisation_of(scheduler: Any) -> Parameterisation:
    name = type(scheduler).__name__
    if name.startswith("EDM"):
        return "edm"
    if name.startswith("FlowMatch"):
        return "flow"
    names: dict[str, Parameterisation] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    return names[scheduler.config.prediction_type]

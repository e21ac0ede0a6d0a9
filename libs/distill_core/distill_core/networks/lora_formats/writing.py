"""LoRA files for other programs, in the form that each of them reads right.

diffusers: its new style, each layer with its own rank. kohya and ComfyUI: one rank for all layers, shorter factors end
in zeros, and alpha is that rank in each layer, since some readers take the commonest alpha for all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill_core.errors import ConfigError, nearest
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.lora_formats.keys import NETWORK
from distill_core.networks.lora_formats.names import SWAPPED, is_flux, is_sdxl, original_names
from distill_core.networks.lora_formats.reading import parts_of
from distill_core.networks.peft_io import Factors, one_rank

Style = Literal["diffusers", "kohya", "comfyui"]
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # that `load_lora_weights` looks for in a folder


def write_lora(factors: Factors, base: Denoiser, file: Path, *, style: Style = "diffusers") -> None:
    """Write the factors of layers of `base`, in float32.

    Raises:
        ConfigError: a style that is unknown, or that has no names for this network's layers.
    """
    if style not in get_args(Style):
        raise ConfigError(f"keys {style!r} are unknown{nearest(style, get_args(Style))}", field="keys")
    shapes = parts_of(base)[NETWORK].shapes
    write = {"diffusers": _diffusers, "kohya": _kohya, "comfyui": _comfyui}[style]
    tensors = write(factors, {path: shape[0] for path, shape in shapes.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()},
        file,
        metadata={"format": "pt"},
    )


def _diffusers(factors: Factors, rows: dict[str, int]) -> dict[str, Tensor]:
    tensors = {}
    for path, (down, up) in factors.items():
        tensors[f"{_slot(rows)}.{path}.lora_A.weight"] = down
        tensors[f"{_slot(rows)}.{path}.lora_B.weight"] = up
    return tensors


def _kohya(factors: Factors, rows: dict[str, int]) -> dict[str, Tensor]:
    names = original_names(rows) if is_sdxl(rows) or is_flux(rows) else {}
    prefix = "lora_unet_" if names or _slot(rows) == "unet" else "lora_transformer_"
    return _with_alpha(
        _named(factors, names or {path: (path,) for path in rows}, rows),
        lambda name: prefix + name.replace(".", "_"),
    )


def _comfyui(factors: Factors, rows: dict[str, int]) -> dict[str, Tensor]:
    names = original_names(rows)
    if not names:
        raise ConfigError(
            "ComfyUI has no names for this network's layers; choose --keys diffusers or kohya", field="keys"
        )
    return _with_alpha(_named(factors, names, rows), lambda name: f"diffusion_model.{name}")


def _slot(paths: Collection[str]) -> str:
    """What a pipeline of diffusers calls the network."""
    return "unet" if "conv_in" in paths else "transformer"


def _with_alpha(factors: Factors, key: Callable[[str], str]) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in one_rank(factors).items():
        tensors[f"{key(name)}.lora_down.weight"] = down
        tensors[f"{key(name)}.lora_up.weight"] = up
        tensors[f"{key(name)}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _named(factors: Factors, names: dict[str, tuple[str, ...]], rows: dict[str, int]) -> Factors:
    """The factors by their other names; those of several layers in one are block-diagonal, their ranks in a row."""
    held = {layer for layers in names.values() for layer in layers}
    strange = next((path for path in factors if path not in held), None)
    if strange is not None:
        raise ConfigError(
            f"these keys have no name for the layer {strange}; choose --keys diffusers", field="keys"
        )
    return {
        name: _fused([factors.get(layer) for layer in layers], [rows[layer] for layer in layers])
        if len(layers) > 1
        else _swapped(layers[0], factors[layers[0]], rows)
        for name, layers in names.items()
        if factors.keys() & set(layers)
    }


def _swapped(path: str, pair: tuple[Tensor, Tensor], rows: Collection[str]) -> tuple[Tensor, Tensor]:
    down, up = pair
    return (down, torch.cat(up.chunk(2)[::-1])) if path == SWAPPED and is_flux(rows) else pair


def _fused(pairs: list[tuple[Tensor, Tensor] | None], rows: list[int]) -> tuple[Tensor, Tensor]:
    given = [pair for pair in pairs if pair is not None]
    columns, up = 0, torch.zeros(sum(rows), sum(len(down) for down, _ in given))
    for pair, start in zip(pairs, [sum(rows[:i]) for i in range(len(rows))], strict=True):
        if pair is not None:
            up[start : start + len(pair[1]), columns : columns + len(pair[0])] = pair[1]
            columns += len(pair[0])
    return torch.cat([down for down, _ in given]), up

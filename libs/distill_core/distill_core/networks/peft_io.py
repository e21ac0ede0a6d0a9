"""The only door to peft: low-rank factors put into a network, taken out of the way, saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from distill_core.errors import ArtifactError, ConfigError, nearest
from distill_core.networks.adapter_configs import CHANGE_BASE, AdapterConfig, read_adapter_config
from distill_core.networks.denoiser import Denoiser

Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> (down, up): its weight gains up @ down
PREFIX = "base_model.model."  # of the names in a peft file
ONLY = "default"  # peft's name for a network's one adapter
PAIRED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose factors are a pair of matrices


def with_lora(
    denoiser: Denoiser, *, rank: int, alpha: float, targets: tuple[str, ...] | None
) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    """A second module tree over the very same weights with trainable low-rank factors, and these by name.

    `denoiser` gains nothing and loses nothing, but its weights are frozen. `targets` are the ends of the names of
    the layers that get factors; None is every linear layer. The factors are float32 and begin as the identity.

    Raises:
        ConfigError: a target that no layer's name ends with, or a layer that cannot have factors.
    """
    network = _network(denoiser)
    names = [name for name, layer in network.named_modules() if name and not list(layer.children())]
    for target in targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ConfigError(
                f"no layer of {type(network).__name__} is called {target!r}"
                f"{nearest(target, {name.split('.')[-1] for name in names})}",
                field="lora.targets",
            )
    chosen = targets or [n for n, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    try:
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(chosen))  # type: ignore[arg-type]
        return _adapted(denoiser, config)
    except ValueError as error:
        raise ConfigError(f"lora.targets are refused: {error}", field="lora.targets") from None


def with_factors(denoiser: Denoiser, factors: Factors) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    """As `with_lora`, with these factors."""
    factors = one_rank(factors)
    twin, parameters = _adapted(denoiser, _config(factors))
    for name, (down, up) in factors.items():
        parameters[f"{name}.lora_A.weight"].data.copy_(down)
        parameters[f"{name}.lora_B.weight"].data.copy_(up)
    return twin, parameters


def factors_of(denoiser: Denoiser) -> Factors:
    """The factors of every adapted layer, at their present strength: the scale is inside `up`."""
    return {
        name: (_weight(layer.lora_A), _weight(layer.lora_B) * layer.scaling[ONLY])
        for name, layer in _adapted_layers(_network(denoiser))
    }


def merge_lora(denoiser: Denoiser) -> Denoiser:
    """`denoiser` itself with its low-rank factors added into the layers they adapt, which are plain again."""
    for _, layer in _adapted_layers(denoiser):
        layer.merge()
    return _unwrapped(denoiser)


def without_lora(denoiser: Denoiser) -> Denoiser:
    """A second module tree over the very same weights, without the factors."""
    return _unwrapped(_twin(denoiser))


def save_peft(factors: Factors, folder: Path, *, base: str = "") -> None:
    """Write peft's own two files. The scale is inside the factors, so that alpha = rank and no reader can miss it."""
    factors = one_rank(factors)
    config = _config(factors)
    config.base_model_name_or_path = base or None
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.float().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.float().cpu().contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_peft(denoiser: Denoiser, folder: Path) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    """As `with_lora`, with the factors of a folder in peft's format, whose scale is multiplied into them.

    Raises:
        ArtifactError: damaged, no plain LoRA, or made for another network.
    """
    try:
        config = read_adapter_config(folder / CONFIG_NAME)
        saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder} is damaged or incomplete: {error}") from None
    try:
        places = _places(denoiser, config)
    except (ValueError, RuntimeError, re.error) as error:  # peft's, for layers that are not there
        raise ArtifactError(f"{folder} does not fit a {type(_network(denoiser)).__name__}: {error}") from None
    factors = _fitting(saved, places, folder)
    if config.init_lora_weights in CHANGE_BASE:
        init = str(config.init_lora_weights)
        for name, layer in places.items():
            if not isinstance(layer, Linear):
                raise ArtifactError(
                    f"{folder} is damaged: {init} is an initialisation of linear layers, not of {name}"
                )
            factors[name] = _over_whole_base(factors[name], layer, init)
    return with_factors(denoiser, factors)


def _places(denoiser: Denoiser, config: AdapterConfig) -> dict[str, LoraLayer]:
    """The layers that peft would give factors to, by name; the factors are on no device and hold nothing."""
    network = _network(_twin(denoiser))
    peft.inject_adapter_in_model(peft.LoraConfig(**config.for_peft()), network, low_cpu_mem_usage=True)
    return dict(_adapted_layers(network))


def _fitting(saved: dict[str, Tensor], places: dict[str, LoraLayer], folder: Path) -> Factors:
    """A file's factors by layer, scaled, if they are those of `places`, all of them and no others."""
    tensors = {name.removeprefix(PREFIX): value for name, value in saved.items()}
    expected = {
        f"{name}.{part}.weight": getattr(layer, part)[ONLY].weight
        for name, layer in places.items()
        for part in ("lora_A", "lora_B")
    }
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise ArtifactError(f"{folder} does not fit its own configuration: {name} is only in one of them")
    for name, value in tensors.items():
        if not value.is_floating_point() or len(tensors) < len(saved):
            raise ArtifactError(
                f"{folder} is damaged: {name} is there twice, or is not a floating-point tensor"
            )
        if value.shape != expected[name].shape:
            raise ArtifactError(
                f"{folder} does not fit this base: {name} has the shape {tuple(value.shape)}, and "
                f"{tuple(expected[name].shape)} is needed"
            )
    return {
        name: (
            tensors[f"{name}.lora_A.weight"].float(),
            tensors[f"{name}.lora_B.weight"].float() * layer.scaling[ONLY],
        )
        for name, layer in places.items()
    }


def _over_whole_base(pair: tuple[Tensor, Tensor], layer: LoraLayer, init: str) -> tuple[Tensor, Tensor]:
    """The factors over the base itself, of factors over what `init` left of it: their product less the initial one."""
    base, scale = copy.deepcopy(layer.get_base_layer()), layer.scaling[ONLY]  # peft changes the base in place
    initial: Any = {"init_lora_weights": init, "lora_alpha": scale * layer.r[ONLY]}
    config = peft.LoraConfig(r=layer.r[ONLY], **initial)
    begun = Linear(base, ONLY, config, r=config.r, lora_alpha=config.lora_alpha)
    down, up = (_weight(part).to(pair[0]) for part in (begun.lora_A, begun.lora_B))
    return torch.cat([pair[0], down]), torch.cat([pair[1], -scale * up], dim=1)


def set_strength(denoiser: Denoiser, strength: float) -> None:
    """Multiply what the factors add by `strength`; 0 skips them, so that nothing but the base is computed."""
    with _flags_kept(denoiser):
        for _, layer in _adapted_layers(denoiser):
            layer.set_scale(ONLY, strength)
            layer.enable_adapters(strength != 0)


@contextlib.contextmanager
def lora_off(denoiser: Denoiser) -> Iterator[None]:
    """The weights without their low-rank factors for the duration, whatever happens inside; may be nested."""
    active = [layer for _, layer in _adapted_layers(denoiser) if not layer.disable_adapters]
    with _flags_kept(denoiser):
        try:
            for layer in active:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in active:
                layer.enable_adapters(True)


@contextlib.contextmanager
def _flags_kept(denoiser: Denoiser) -> Iterator[None]:
    """Peft sets `requires_grad` as it likes."""
    flags = [(value, value.requires_grad) for value in denoiser.parameters()]
    try:
        yield
    finally:
        for value, flag in flags:
            value.requires_grad_(flag)


def _network(denoiser: Denoiser) -> nn.Module:
    return getattr(denoiser, "network", denoiser)


def _adapted_layers(module: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The layers with factors, by name.

    Raises:
        ValueError: one whose factors are no pair of matrices: an embedding, an attention, grouped convolutions.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        if not isinstance(base, PAIRED) or getattr(base, "groups", 1) > 1:
            raise ValueError(
                f"{name} is a {type(base).__name__}; only linear layers and convolutions without groups can be adapted"
            )
    return layers


def _weight(parts: nn.ModuleDict) -> Tensor:
    """One factor's values, of a layer's `lora_A` or `lora_B`."""
    return parts[ONLY].get_parameter("weight").detach()


def _twin(denoiser: Denoiser) -> Denoiser:
    shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    return copy.deepcopy(denoiser, shared)  # what is in the memo is not copied


def _unwrapped(denoiser: Denoiser) -> Denoiser:
    network = _network(denoiser)
    for name, layer in _adapted_layers(network):
        network.set_submodule(name, layer.get_base_layer())
    del network.peft_config
    return denoiser


def _adapted(denoiser: Denoiser, config: peft.LoraConfig) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    twin = _twin(denoiser)
    network = _network(twin)
    peft.inject_adapter_in_model(config, network)
    _adapted_layers(network)  # refuses those that have no pair of factors
    twin.eval()
    factors = {name: value for name, value in network.named_parameters() if ".lora_" in name}
    for value in factors.values():
        value.data = value.data.float()
    return twin, {name.replace(f".{ONLY}.", "."): value for name, value in factors.items()}


def _config(factors: Factors) -> peft.LoraConfig:
    rank = next(iter(factors.values()))[0].shape[0]
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(factors))


def one_rank(factors: Factors) -> Factors:
    """The same products with one rank for all layers: shorter factors end in zeros."""
    rank = max(down.shape[0] for down, _ in factors.values())
    return {name: (_longer(down, 0, rank), _longer(up, 1, rank)) for name, (down, up) in factors.items()}


def _longer(value: Tensor, dim: int, size: int) -> Tensor:
    after = [0, 0] * (value.ndim - 1 - dim) + [0, size - value.shape[dim]]  # pairs, the last dimension first
    return functional.pad(value, after)

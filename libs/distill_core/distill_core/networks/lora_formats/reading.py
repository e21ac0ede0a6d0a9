"""LoRA files read over the model that they adapt: factors by layer, with their scale inside.

W = W0 + (alpha / r) up @ down,    kept as the pair (down, (alpha / r) up);    no alpha in the file means alpha = r
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_core.errors import ArtifactError
from distill_core.networks.adapter_configs import AdapterConfig, adapter_config_of
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.foreign.weights import read_safetensors
from distill_core.networks.lora_formats.keys import NETWORK, Key, Role, parsed
from distill_core.networks.lora_formats.names import SWAPPED, Names, names_of, text_names
from distill_core.networks.peft_io import PAIRED, Factors

METADATA = "lora_adapter_metadata"  # in a file's header: peft's configuration of each part
SHOWN = 5  # layers that an error names
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """One model that a LoRA adapts: the shapes of its layers' weights, and every way of writing their names."""

    shapes: Mapping[str, torch.Size]
    names: Names

    @classmethod
    def of(cls, model: nn.Module, *, text: bool = False) -> Part:
        """The layers of `model` that can be adapted."""
        layers = {
            name: layer.weight.shape
            for name, layer in model.named_modules()
            if isinstance(layer, PAIRED) and getattr(layer, "groups", 1) == 1
        }
        return cls(layers, (text_names if text else names_of)(layers.keys()))


@dataclass(frozen=True)
class Lora:
    """Factors by part (`network`, `text_encoder`, `text_encoder_2`) and layer."""

    style: str  # whose keys the file has
    parts: Mapping[str, Factors]
    assumed: tuple[str, ...] = field(default=())  # sentences on what the file does not say

    @property
    def network(self) -> Factors:
        """Those of the denoiser's network."""
        return self.parts.get(NETWORK, {})

    @property
    def text(self) -> dict[str, Factors]:
        """Those of the text encoders."""
        return {part: factors for part, factors in self.parts.items() if part != NETWORK}


def parts_of(base: Denoiser) -> dict[str, Part]:
    """What of a denoiser a LoRA can adapt: its network, and its text encoders."""
    text = getattr(base, "text", None)
    models = {} if text is None else {n: m for n, m in text.parts.items() if isinstance(m, nn.Module)}
    encoders = {name: Part.of(model, text=True) for name, model in models.items()}
    return {NETWORK: Part.of(getattr(base, "network", base)), **encoders}


def read_lora(file: Path, parts: Mapping[str, Part], *, base: str = "this base") -> Lora:
    """The LoRA in a safetensors file, over a model with these parts; every key of it is used.

    Raises:
        ArtifactError: no safetensors, not finite, no plain LoRA, a key that is not understood, or layers that `base`
            has not.
    """
    tensors, header = read_safetensors(file)
    return assembled(tensors, header, parts, where=str(file), base=base)


def assembled(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    parts: Mapping[str, Part],
    *,
    where: str,
    base: str = "this base",
) -> Lora:
    """As `read_lora`, of the tensors of a file and its header's words."""
    meanings = parsed(tensors, where)
    if not meanings:
        raise ArtifactError(f"{where} holds no tensors; expected a LoRA")
    _check_numbers(tensors, where)
    configs = _configs(header, where)
    layers = _by_layer(tensors, meanings, where)
    if configs and any("alpha" in roles for roles in layers.values()):
        raise ArtifactError(f"{where} says its scales twice, as .alpha and as {METADATA}; remove one of them")
    pairs = {at: _pair(at, roles, configs.get(at[0]), where) for at, roles in layers.items()}
    factors = _placed(pairs, parts, where, base)
    styles = sorted({meaning.style for meaning in meanings.values() if meaning.role != "alpha"})
    return Lora(" and ".join(styles), factors, _assumed(layers, configs))


def _assumed(
    layers: Mapping[tuple[str, str], Mapping[Role, Tensor]], configs: Mapping[str, AdapterConfig]
) -> tuple[str, ...]:
    lacking = sum("alpha" not in roles for (part, _), roles in layers.items() if part not in configs)
    return (f"alpha is the rank in {lacking} of {len(layers)} layers, which say none",) if lacking else ()


def _check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, value in tensors.items():
        if not value.is_floating_point() and not name.endswith(".alpha"):
            raise ArtifactError(f"{where} is damaged: {name} holds no floating-point numbers")
        if not torch.isfinite(value.float()).all():
            raise ArtifactError(f"{where} is damaged: {name} has values that are not finite")


def _configs(header: Mapping[str, str], where: str) -> dict[str, AdapterConfig]:
    """Peft's configuration of each part, which diffusers keeps in the header as `part.key`."""
    if METADATA not in header:
        return {}
    try:
        table = json.loads(header[METADATA])
    except ValueError as error:
        raise ArtifactError(f"{where} is damaged: {METADATA} in its header: {error}") from None
    if not isinstance(table, dict):
        raise ArtifactError(f"{where} is damaged: {METADATA} in its header is no table")
    values: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        part, _, name = key.partition(".")
        values.setdefault(NETWORK if part in ("unet", "transformer") else part, {})[name] = value
    return {
        part: adapter_config_of(found, f"{where} in its {METADATA}, {part},")
        for part, found in values.items()
    }


def _by_layer(
    tensors: Mapping[str, Tensor], meanings: Mapping[str, Key], where: str
) -> dict[tuple[str, str], dict[Role, Tensor]]:
    layers: dict[tuple[str, str], dict[Role, Tensor]] = {}
    for key, meaning in meanings.items():
        roles = layers.setdefault((meaning.part, meaning.layer), {})
        if meaning.role in roles:
            raise ArtifactError(f"{where} holds {key} twice, in two ways of writing")
        roles[meaning.role] = tensors[key]
    for (_, layer), roles in layers.items():
        lacking = next((role for role in ("down", "up") if role not in roles), None)
        if lacking is not None:
            raise ArtifactError(f"{where} is incomplete: {layer} has no {lacking} factor")
    return layers


def _pair(
    at: tuple[str, str], roles: Mapping[Role, Tensor], config: AdapterConfig | None, where: str
) -> Pair:
    down, up = roles["down"].float(), roles["up"].float()
    rank = down.shape[0] if down.ndim else 0
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or not rank or up.shape[1] != rank:
        raise ArtifactError(
            f"{where} is damaged: the factors of {at[1]} have the shapes {tuple(down.shape)} and {tuple(up.shape)}, "
            "which do not go together"
        )
    if config is not None:
        if config.rank_of(at[1]) != rank:
            raise ArtifactError(
                f"{where} says rank {config.rank_of(at[1])} for {at[1]}, and its factors have {rank}"
            )
        return down, up * config.scale_of(at[1])
    alpha = roles.get("alpha")
    if alpha is None:
        return down, up
    if alpha.numel() != 1:
        raise ArtifactError(f"{where} is damaged: alpha of {at[1]} is no single number")
    return down, up * (float(alpha) / rank)


def _placed(
    pairs: Mapping[tuple[str, str], Pair], parts: Mapping[str, Part], where: str, base: str
) -> dict[str, Factors]:
    """The factors of each layer of the parts that they are for, or which of them fit none."""
    found: dict[str, Factors] = {}
    misfits = []
    for (part, written), pair in pairs.items():
        known = parts.get(part)
        layers = known.names.get(written) if known else None
        pieces = _split(written, pair, layers, known) if known and layers else None
        if pieces is None:
            shown = written if part == NETWORK else f"{part}.{written}"
            misfits.append(shown if layers is None else f"{shown} {_sizes(pair)}")
            continue
        factors = found.setdefault(part, {})
        for layer in pieces.keys() & factors.keys():
            raise ArtifactError(f"{where} holds the factors of {layer} twice, under two names")
        factors.update(pieces)
    if misfits:
        shown = ", ".join(misfits[:SHOWN]) + (" …" if len(misfits) > SHOWN else "")
        raise ArtifactError(
            f"{where} is no LoRA of {base}: {len(misfits)} of its {len(pairs)} layers do not fit: {shown}"
        )
    return found


def _sizes(pair: Pair) -> str:
    return f"({pair[1].shape[0]} from {pair[0].shape[1]})"


def _split(written: str, pair: Pair, layers: tuple[str, ...], part: Part) -> Factors | None:
    """The factors of each of the layers whose rows follow each other; None if they do not fit."""
    down, up = pair
    rows = [part.shapes[layer][0] for layer in layers]
    if sum(rows) != up.shape[0]:
        return None
    if layers == (SWAPPED,) and written.startswith("final_layer"):
        up = torch.cat(up.chunk(2)[::-1])
    pieces: Factors = {}
    for layer, own in zip(layers, up.split(rows), strict=True):
        fitted = _fitted((down, own), part.shapes[layer])
        if fitted is None:
            return None
        pieces[layer] = fitted
    return pieces if len(pieces) == 1 else _used(pieces)


def _used(pieces: Factors) -> Factors:
    """The same products without the ranks that a layer's rows make nothing of, nor layers that have no others."""
    short = {}
    for layer, (down, up) in pieces.items():
        used = up.flatten(1).any(dim=0)
        if used.any():
            short[layer] = down[used].contiguous(), up[:, used].contiguous()
    return short or pieces


def _fitted(pair: Pair, shape: torch.Size) -> Pair | None:
    """The factors in the shapes that a layer of this weight has; None if it is another layer's."""
    down, up = pair
    ones = (1,) * (len(shape) - 2)
    if up.shape[2:].numel() != 1 or up.shape[0] != shape[0]:
        return None
    if down[0].numel() != shape[1:].numel() or down.shape[1] != shape[1]:
        return None
    if down.ndim == len(shape) and down.shape[1:] != shape[1:]:
        return None
    return down.reshape(-1, *shape[1:]), up.reshape(*up.shape[:2], *ones)

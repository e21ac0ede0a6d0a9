"""Adapters that guide: a small network beside every attention layer of a frozen one, told the guidance w.

    out <- out + (w - 1) U silu(V h + M e),    e = MLP(phi(w - 1), phi(ln s), c),    U = 0 at first

`h` (B, N, D) is what the layer reads, `out` what it answers, s the noise level and c the class or the mean of the
prompt's tokens. Guidance is conditional plus (w - 1) times a direction, which is why w - 1 stands outside: at w = 1,
and where no guidance is told, the network is what it was, bit for bit. Without V h (`reads_input`) all tokens are
moved alike.

What the adapters are told travels with the call as the condition `adapters_told` (B, 1 + E), so a batch mixes scales.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.artifacts import CondSpec
from distill_core.config import Config
from distill_core.errors import ConfigError
from distill_core.method import Cond
from distill_core.networks.scalar_conditions import NUM_FREQUENCIES, frequencies, periodic
from distill_core.networks.steering import PlainAttention, make_steerable

TOLD = "adapters_told"
LAYERS = ("attn1", "attn2")  # self-attention, and where there is one cross-attention
NETWORKS = ("DiTTransformer2DModel", "UNet2DConditionModel", "PixArtTransformer2DModel")


class GuidanceAdapterConfig(Config):
    """Size of the adapters."""

    width: int = Field(32, ge=1, le=4096)  # E, of what they are told; official: 256
    hidden: int = Field(32, ge=1, le=4096)  # between V and U, of each layer
    reads_input: bool = (
        True  # False: a layer's answer is moved by w, s and c alone, as the official additive kind
    )


class LayerAdapter(nn.Module):
    """U silu(V h + M e) of one attention layer."""

    def __init__(self, config: GuidanceAdapterConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, config.hidden, bias=False) if config.reads_input else None
        self.told = nn.Linear(config.width, config.hidden)
        self.up = nn.Linear(config.hidden, width_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        """What is added (B, N, D) for `h` (B, N, D') and `told` (B, 1 + E), in the adapter's own precision."""
        h, told = h.to(self.up.weight.dtype), told.to(self.up.weight.dtype)
        hidden = self.told(told[:, 1:])[:, None]
        if self.down is not None:
            hidden = hidden + self.down(h)
        added: Tensor = told[:, :1, None] * self.up(nn.functional.silu(hidden))
        return added


class GuidanceAdapters(nn.Module):
    """The adapters of all attention layers of `network`, and the embedding of what they are told."""

    frequencies: Tensor

    def __init__(self, config: GuidanceAdapterConfig, network: nn.Module, cond: CondSpec) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Sequential(
            nn.Linear(4 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.register_buffer("frequencies", frequencies(), persistent=False)
        self.condition = _condition(cond, width)
        self.layers = nn.ModuleList(
            LayerAdapter(config, *_widths(layer)) for layer in attention_layers(network)
        )

    def told(self, guidance: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """What every adapter reads (B, 1 + E): w - 1, and e."""
        offset = guidance.float() - 1
        waves = [periodic(value, self.frequencies) for value in (offset, sigma.float().log())]
        e = self.embed[0](torch.cat(waves, 1))
        if self.condition is not None:
            e = e + self.condition(_mean(cond))
        return torch.cat([offset[:, None], self.embed[1:](e)], 1)

    def attach(self, network: nn.Module) -> None:
        """Put the adapters beside the attention layers of `network`, whose weights they do not enter."""
        make_steerable(network)
        for layer, adapter in zip(attention_layers(network), self.layers, strict=True):
            plain = layer.processor
            layer.processor = AdaptedAttention(
                plain.plain if isinstance(plain, AdaptedAttention) else plain, adapter
            )


class AdaptedAttention(PlainAttention):
    """An attention processor as it was, and the layer's adapter where the call tells it something."""

    def __init__(self, plain: Any, adapter: nn.Module) -> None:
        super().__init__(plain)
        self.adapter = adapter

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        nasa_scale: Tensor | None = None,
        adapters_told: Tensor | None = None,
    ) -> Tensor:
        others = encoder_hidden_states, attention_mask, temb, negative_prompt_embeds, nasa_scale
        out: Tensor = self.plain(attn, hidden_states, *others)
        if adapters_told is None:
            return out
        added: Tensor = self.adapter(hidden_states, adapters_told)
        return out + added.to(out.dtype)


def told_to_attention(cond: Cond) -> dict[str, Any]:
    """What a call tells the attention layers beside their inputs, by the name that diffusers passes on."""
    names = ("negative_prompt_embeds", "nasa_scale") if "nasa_scale" in cond else ()
    words = {name: cond[name] for name in (*names, *((TOLD,) if TOLD in cond else ()))}
    return {"cross_attention_kwargs": words} if words else {}


def attention_layers(network: nn.Module) -> list[Any]:
    """The attention layers that have adapters, in the network's own order.

    Raises:
        ConfigError: a network of a class that tells them nothing.
    """
    if type(network).__name__ not in NETWORKS:
        raise ConfigError(
            f"{type(network).__name__} tells its attention layers nothing of a call, which adapters need; choose one "
            f"of {', '.join(NETWORKS)}",
            field="teacher",
        )
    return [layer for name, layer in network.named_modules() if name.rpartition(".")[2] in LAYERS]


def _widths(layer: Any) -> tuple[int, int]:
    return layer.to_q.in_features, layer.to_out[0].out_features


def _condition(cond: CondSpec, width: int) -> nn.Module | None:
    if cond.kind == "class_label":
        assert cond.num_classes is not None
        return nn.Embedding(cond.num_classes + (cond.null_label is not None), width)
    return nn.Linear(cond.embed_dim, width, bias=False) if cond.embed_dim else None


def _mean(cond: Cond) -> Tensor:
    """Labels (B,), or the mean (B, D) of the tokens that are there."""
    if "class_label" in cond:
        return cond["class_label"]
    prompt = cond["prompt_embeds"].float()
    mask = cond.get("prompt_mask", torch.ones(prompt.shape[:2], device=prompt.device))
    present = mask.float()[..., None]
    mean: Tensor = (prompt * present).sum(1) / present.sum(1).clamp_min(1)
    return mean

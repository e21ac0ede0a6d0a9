"""Negative-away steering attention (NASA): cross-attention reads a negative prompt too, and turns away from it.

    Z = Z+ - alpha Z-,    Z+ = softmax(Q K+^T / sqrt(d)) V+,    Z- = softmax(Q K-^T / sqrt(d)) V-

K and V come from the prompt and from the negative prompt, through the same projections; Q is shared; the output
projection sees Z alone (Nguyen et al. 2024, arXiv 2412.02687). Z is not renormalised: with alpha above 1 the negative
prompt dominates.

Negative prompt and alpha are conditions like any other, `negative_prompt_embeds` (B, T, D) and `nasa_scale` (B,), and
travel with the call. Nothing is switched on or off, so there is nothing to restore after an error, no thread disturbs
another, a batch mixes requests with and without, recomputed activations are the same, and a graph takes them as inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser

NEGATIVE = "negative_"  # before the name of each condition that a negative prompt gives


class PlainAttention:
    """A diffusers attention processor as it was: what steers is handed to self-attention too, which ignores it."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        nasa_scale: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out


class NegativeAwayAttention(PlainAttention):
    """The processor of a cross-attention: the plain one, unless there is something to turn away from."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        nasa_scale: Tensor | None = None,
    ) -> Tensor:
        if negative_prompt_embeds is None or nasa_scale is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        assert encoder_hidden_states is not None
        assert attention_mask is None, "prompts are padded, not masked"
        query = _heads(attn, attn.to_q(hidden_states))
        away = attend(attn, query, negative_prompt_embeds.to(encoder_hidden_states.dtype))
        alpha = nasa_scale.to(away.dtype)[:, None, None]
        z = attend(attn, query, encoder_hidden_states) - alpha * away
        out: Tensor = attn.to_out[1](attn.to_out[0](z))
        scale: float = attn.rescale_output_factor
        return (out + hidden_states if attn.residual_connection else out) / scale


def attend(attn: Any, query: Tensor, context: Tensor) -> Tensor:
    """What the attention layer `attn` reads in `context` (B, T, D) for `query` (B, heads, N, d): (B, N, heads d)."""
    key, value = _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _heads(attn: Any, projected: Tensor) -> Tensor:
    heads: Tensor = projected.unflatten(2, (attn.heads, -1))
    return heads.transpose(1, 2)


def make_steerable(network: nn.Module) -> None:
    """Give every cross-attention (`attn2`) of a diffusers network the steering processor; its output stays the same."""
    for name, layer in network.named_modules():
        kind = {"attn1": PlainAttention, "attn2": NegativeAwayAttention}.get(name.rpartition(".")[2])
        if kind is not None and not isinstance(layer.processor, PlainAttention):
            layer.processor = kind(layer.processor)


def with_negative(
    denoiser: Denoiser, cond: Cond, negative: Sequence[str | None], *, scale: float | None = None
) -> Cond:
    """The conditions with a negative prompt per item; None is an item without.

    With a `scale` (alpha) they steer the cross-attention. Without, classifier-free guidance leads away from them
    instead of from the null condition, as usual for models that are guided.
    """
    has_negative = torch.tensor([prompt is not None for prompt in negative])
    encoded = denoiser.encode_negative([prompt or "" for prompt in negative])
    null = denoiser.null_cond(len(negative))
    negatives = {}
    for name, value in encoded.items():
        chosen = has_negative.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
        negatives[NEGATIVE + name] = torch.where(chosen, value, null[name].to(value.device))
    steer = {} if scale is None else {"nasa_scale": scale * has_negative.float()}
    return {**cond, **negatives, **steer}

"""Rotary positions (Su et al. 2021, arXiv 2104.09864) in real numbers: exported graphs know no complex ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Rotation(nn.Module):
    """Cosines and sines (2, N, d / 2) of the complex factors (N, d / 2) that each name stands for."""

    def __init__(self, **factors: Tensor) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_buffer(name, torch.stack([factor.real, factor.imag]), persistent=False)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys (B, N, heads, d), neighbouring pairs turned by the cosines and sines (2, [B,] N, d / 2)."""
    cos, sin = turn.unsqueeze(-2)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, N, heads, d) each to the keys where `mask` (B, N) is true, None: to all; (B, N, heads d)."""
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    shown = None if mask is None else mask[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2).flatten(2)


def projected(attn: Any, states: Tensor, *, added: bool = False) -> list[Tensor]:
    """Query, key and value (B, N, heads, d) of states, the first two normed; `added`: by the layers of the text."""
    layers = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    norms = ("norm_added_q", "norm_added_k", "") if added else ("norm_q", "norm_k", "")
    found = []
    for layer, norm in zip(layers, norms, strict=True):
        heads = getattr(attn, layer)(states).unflatten(-1, (attn.heads, -1))
        normed = getattr(attn, norm) if norm else None
        found.append(heads if normed is None else normed(heads))
    return found

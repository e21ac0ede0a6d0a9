"""What an encoder's attention and features look like: how alike its heads are, how far they look, how many ways differ.

All are of one block: queries and keys (B, T, D) of some heads, features (B, N, D). No figure depends on labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def heads_of(tokens: Tensor, count: int) -> Tensor:
    """(B, heads, T, D / heads) of tokens (B, T, D)."""
    b, t, d = tokens.shape
    return tokens.reshape(b, t, count, d // count).transpose(1, 2)


def attention_maps(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """(B, heads, T, T) shares of each query's attention, of queries and keys (B, T, D)."""
    q, k = heads_of(queries.float(), count), heads_of(keys.float(), count)
    scores: Tensor = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.softmax(3)


def head_similarity(maps: Tensor) -> float:
    """The mean cosine between the maps (B, heads, T, T) of two heads for one query; 1: all heads look alike."""
    heads = maps.shape[1]
    rows = F.normalize(maps, dim=3)
    cosines = torch.einsum("bitk,bjtk->bijt", rows, rows).mean((0, 3))
    return float((cosines.sum() - cosines.diagonal().sum()) / (heads * (heads - 1)))


def attention_distance(maps: Tensor, width: int, prefixes: int) -> float:
    """The mean distance, in patches, at which patches look at each other. Dosovitskiy et al. 2021, appendix D.7.

    `maps` (B, heads, T, T) begin with `prefixes` tokens that are no patches; patches are rows of `width`.
    """
    among = maps[:, :, prefixes:, prefixes:]
    among = among / among.sum(3, keepdim=True)
    number = torch.arange(among.shape[3], device=maps.device)
    places = torch.stack([number // width, number % width], dim=1).float()
    return float((among * torch.cdist(places, places)).sum(3).mean())


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the singular values' shares, of features (B, N, D) around their mean.

    Roy & Vetterli 2007, The Effective Rank.
    """
    rows = features.flatten(0, 1).double()
    values = torch.linalg.svdvals(rows - rows.mean(0))
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.clamp(min=1e-30).log()).sum()))

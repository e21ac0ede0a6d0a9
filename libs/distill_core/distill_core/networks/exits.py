"""Exits: small heads on a network's features, trained beside it and left out of what is published.

Features are maps (C, H, W), tokens (N, D) of a square grid after at most two others (class, distillation), or vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.networks.predictor import Predictor

Shape = tuple[int, ...]
MOST_PREFIXES = 2  # tokens before those of the patches


class WithExits(nn.Module):
    """A predictor and its heads, so that one optimiser trains them; only the predictor is published."""

    def __init__(self, predictor: Predictor, exits: Sequence[nn.Module]) -> None:
        super().__init__()
        self.predictor, self.exits = predictor, nn.ModuleList(exits)

    def forward(self, image: Tensor) -> Tensor:
        """What the predictor answers."""
        out: Tensor = self.predictor(image)
        return out


class MapExit(nn.Module):
    """Maps (B, C, H, W) -> logits (B, K): `halvings` pairs of separable convolutions, each doubling the channels."""

    def __init__(self, channels: int, halvings: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [*_separable(channels, 2 * channels, 2), *_separable(2 * channels, 2 * channels, 1)]
            channels *= 2
        self.layers = nn.Sequential(*(layers or _pointwise(channels, channels)))
        self.last = nn.Linear(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layers(features).mean((2, 3)))
        return logits


class TokenExit(nn.Module):
    """Tokens (B, N, D) -> logits (B, K): transformer blocks, then the class token, or the mean where there is none."""

    def __init__(self, width: int, blocks: int, num_classes: int, *, has_class_token: bool) -> None:
        super().__init__()
        self.has_class_token = has_class_token
        heads = math.gcd(width, 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features)
        pooled = features[:, 0] if self.has_class_token else features.mean(1)
        logits: Tensor = self.last(self.norm(pooled))
        return logits


class VectorExit(nn.Module):
    """Vectors (B, D) -> logits (B, K)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(features)
        return logits


def exits_of(shapes: Mapping[str, Shape], num_classes: int, *, field: str) -> list[nn.Module]:
    """An exit for each tap, by the shape of its features and by how many taps are behind it.

    Raises:
        ConfigError: tokens that are no square grid.
    """
    behind = range(len(shapes) - 1, -1, -1)
    return [
        exit_of(shape, left, num_classes, path, field=field)
        for (path, shape), left in zip(shapes.items(), behind)
    ]


def exit_of(shape: Shape, behind: int, num_classes: int, path: str, *, field: str) -> nn.Module:
    """The exit for features of `shape` with `behind` further stages after them."""
    if len(shape) == 3:
        halvings = min(behind, int(math.log2(max(min(shape[1:]), 1))))
        return MapExit(shape[0], halvings, num_classes)
    if len(shape) == 2:
        prefixes = prefixes_of(shape[0], path, field=field)
        return TokenExit(shape[1], max(behind, 1), num_classes, has_class_token=prefixes > 0)
    return VectorExit(shape[0], num_classes)


def prefixes_of(tokens: int, path: str, *, field: str) -> int:
    """How many of `tokens` come before those of a square grid.

    Raises:
        ConfigError: no square is left with at most two others.
    """
    left = tokens - math.isqrt(tokens) ** 2
    if left > MOST_PREFIXES:
        raise ConfigError(
            f"{field} names {path!r}, which gives {tokens} tokens: no square grid after a class or distillation token; "
            "choose square pictures, or another module",
            field=field,
        )
    return left


class Hint(nn.Module):
    """Distance of features from another network's of any shape, after a learnt projection (FitNets, Romero 2015)."""

    def __init__(self, own: Shape, other: Shape) -> None:
        super().__init__()
        self.project = nn.Conv2d(_channels(own), _channels(other), 1)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """(B,) mean squared distance on the coarser of both grids."""
        ours, theirs = self.project(as_map(own)), as_map(other)
        size = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
        ours, theirs = (F.adaptive_avg_pool2d(value, size) for value in (ours, theirs))
        return (ours - theirs).square().mean((1, 2, 3))


def as_map(features: Tensor) -> Tensor:
    """Features as maps (B, C, H, W): tokens without those before their grid, a vector as one pixel."""
    if features.ndim == 4:
        return features
    if features.ndim == 2:
        return features[:, :, None, None]
    side = math.isqrt(features.shape[1])
    grid = features[:, features.shape[1] - side**2 :]
    return grid.transpose(1, 2).reshape(len(grid), -1, side, side)


def _channels(shape: Shape) -> int:
    return shape[1] if len(shape) == 2 else shape[0]


def _separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [depthwise, *_pointwise(channels, out)]


def _pointwise(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

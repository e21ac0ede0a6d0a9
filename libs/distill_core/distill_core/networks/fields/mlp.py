"""MLP field (Mildenhall et al. 2020, "NeRF: Scenes as Neural Radiance Fields", arXiv 2003.08934)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.networks.fields.base import NetworkField, NetworkFieldConfig


class MLPConfig(NetworkFieldConfig):
    layers: int = Field(4, ge=1, le=16)
    width: int = Field(96, ge=4, le=1024)
    octaves: int = Field(6, ge=1, le=16)  # frequencies pi * 2^k, k < octaves
    features: int = Field(28, ge=1, le=256)  # what the trunk hands to the density network
    skip: int = Field(3, ge=1, le=16)  # the input joins again after this many layers


def frequency_encoding(values: Tensor, octaves: int) -> Tensor:
    """`values` (M, 3) in [-1, 1] with sines and cosines of pi 2^k values: (M, 3 + 6 octaves)."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves, device=values.device)
    angles = (values[:, None] * frequencies[:, None]).flatten(1)
    return torch.cat([values, angles.sin(), angles.cos()], -1)


class MLPField(NetworkField):
    """Frequency encoding and a fully connected trunk. Few parameters, slow to train, smooth."""

    kind: ClassVar[str] = "mlp"
    Config: ClassVar[type[MLPConfig]] = MLPConfig

    def __init__(self, config: MLPConfig, bound: float) -> None:
        super().__init__(config, bound, config.features)
        self.octaves, self.skip = config.octaves, config.skip
        encoded = 3 + 6 * config.octaves
        widths = [encoded] + [config.width] * config.layers
        joins = [index == config.skip for index in range(config.layers)]
        self.trunk = nn.ModuleList(
            nn.Linear(wide + encoded * join, config.width) for wide, join in zip(widths, joins)
        )
        self.out = nn.Linear(config.width, config.features)

    def encode(self, unit: Tensor) -> Tensor:
        encoded = frequency_encoding(2 * unit - 1, self.octaves)
        hidden = encoded
        for index, layer in enumerate(self.trunk):
            joined = torch.cat([hidden, encoded], -1) if index == self.skip else hidden
            hidden = layer(joined).relu()
        features: Tensor = self.out(hidden)
        return features

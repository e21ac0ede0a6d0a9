"""Materials of a surface by position: albedo, roughness, metallic, how far physics explains it, and its normal."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.errors import ConfigError
from distill_core.networks.fields import build_field
from distill_core.networks.fields.base import clip_straight_through
from distill_core.networks.fields.mlp import frequency_encoding
from distill_core.recipe.tables import NetworkConfig

BEGINS = (0.99, 0.99, 0.99, 0.99, 0.99)  # albedo, roughness, metallic before training
ALPHA = 0.01  # before training; larger ones fall into the minimum that the method avoids
ALPHA_GAIN = 8.0  # of its logit, which has ten times as far to go as what lies in [0, 1]


class MaterialConfig(Config):
    """Shape of the networks that give a surface's materials."""

    network: NetworkConfig = NetworkConfig(
        name="hash", args={"levels": 4, "log2_table_size": 15, "min_resolution": 8, "max_resolution": 64}
    )  # any kind of field with a feature; its density and colours are not read
    progress: Literal["map", "one"] = "map"  # one: alpha is 1 everywhere, i.e. plain inverse rendering
    normal_width: int = Field(48, ge=4, le=1024)
    normal_octaves: int = Field(3, ge=1, le=12)  # few: normals of a smooth network do not copy a grid's noise


class Materials(NamedTuple):
    albedo: Tensor  # (M, 3), linear, in [0, 1]
    roughness: Tensor  # (M,), in [0, 1]
    metallic: Tensor  # (M,), in [0, 1]
    alpha: Tensor  # (M,), in [0, 1]: 0 as the radiance field has it, 1 as physics has it
    normal: Tensor  # (M, 3), unit length


class MaterialField(nn.Module):
    """Positions (M, 3) in the box [-bound, bound]^3 to `Materials`."""

    def __init__(self, config: MaterialConfig, bound: float) -> None:
        super().__init__()
        self.config, self.bound = config, bound
        self.features = build_field(config.network, bound)
        if not self.features.geo_dim:
            raise ConfigError(
                f"a field of kind {config.network.name!r} has no feature that materials could be read from; "
                "choose hash or mlp",
                field="materials.network",
            )
        self.head = nn.Linear(self.features.geo_dim, len(BEGINS) + 1)
        wide = 3 + 6 * config.normal_octaves
        hidden = [nn.Linear(wide, config.normal_width), nn.SiLU()]
        hidden += [nn.Linear(config.normal_width, config.normal_width), nn.SiLU()]
        self.normal = nn.Sequential(*hidden, nn.Linear(config.normal_width, 3))
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor([*BEGINS, math.log(ALPHA / (1 - ALPHA)) / ALPHA_GAIN]))

    def forward(self, positions: Tensor) -> Materials:
        values = self.head(self.features.block1(positions).geo).float()
        # differs from the paper's sigmoids: at 0.99 their slope is a hundredth, and all values share their features
        albedo, single = clip_straight_through(values[:, :5], 0.0, 1.0).split((3, 2), -1)
        alpha = (ALPHA_GAIN * values[:, 5]).sigmoid()
        if self.config.progress == "one":
            alpha = torch.ones_like(alpha)
        normal = self.normal(frequency_encoding(positions / self.bound, self.config.normal_octaves))
        roughness, metallic = single.unbind(-1)
        return Materials(albedo, roughness, metallic, alpha, F.normalize(normal.float(), dim=-1))

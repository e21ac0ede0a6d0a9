"""What every radiance field is: position to density and feature, feature and direction to colour."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.radiance.sh import spherical_harmonics


class FieldConfig(Config):
    """Shape of the two small networks that follow a field's encoding."""

    hidden: int = Field(64, ge=1, le=1024)
    geo_dim: int = Field(15, ge=1, le=256)  # width of the feature between the blocks
    sh_degree: int = Field(4, ge=1, le=4)
    min_log_density: float = Field(-12.0, ge=-30, le=0)  # the clip range
    max_log_density: float = Field(7.0, gt=0, le=15)
    log_density_shift: float = -1.0  # below zero: training starts thin, light reaches the whole box


class Block1(NamedTuple):
    log_density: Tensor  # (M,), clipped
    geo: Tensor  # (M, geo_dim)


class FieldSample(NamedTuple):
    density: Tensor  # (M,), 1/scene unit
    radiance: Tensor  # (M, 3), in [0, 1]


def clip_straight_through(values: Tensor, low: float, high: float) -> Tensor:
    """`values` clipped, with the gradient of the identity, so that a saturated density can come back."""
    return values + (values.clamp(low, high) - values).detach()


def bias_free_mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths without bias, ReLU between them."""
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RadianceField(nn.Module, abc.ABC):
    """A scene in the box [-bound, bound]^3: `encode` is all that the kinds of field differ in."""

    kind: ClassVar[str]
    Config: ClassVar[type[FieldConfig]] = FieldConfig

    def __init__(self, config: FieldConfig, bound: float, encoding_dim: int) -> None:
        super().__init__()
        self.config, self.bound = config, bound
        self.sigma_net = bias_free_mlp(encoding_dim, config.hidden, 1 + config.geo_dim)
        self.color_net = bias_free_mlp(config.geo_dim + config.sh_degree**2, config.hidden, config.hidden, 3)

    @abc.abstractmethod
    def encode(self, unit: Tensor) -> Tensor:
        """Encoding (M, E) of positions (M, 3) in [0, 1]^3."""

    def block1(self, positions: Tensor) -> Block1:
        """Clipped log-density (M,) and feature (M, geo_dim) at `positions` (M, 3) in scene units."""
        raw = self.sigma_net(self.encode((positions + self.bound) / (2 * self.bound))).float()
        shifted = raw[:, 0] + self.config.log_density_shift
        clipped = clip_straight_through(shifted, self.config.min_log_density, self.config.max_log_density)
        return Block1(clipped, raw[:, 1:])

    def block2(self, geo: Tensor, directions: Tensor) -> Tensor:
        """Radiance (M, 3) from block 1's feature and unit `directions` (M, 3)."""
        basis = spherical_harmonics(directions, self.config.sh_degree)
        return torch.sigmoid(self.color_net(torch.cat([basis, geo], -1)).float())

    def log_density(self, positions: Tensor) -> Tensor:
        """Log of the density (M,): all that occupancy and meshes need."""
        return self.block1(positions).log_density

    def forward(self, positions: Tensor, directions: Tensor) -> FieldSample:
        """Density and radiance at `positions` (M, 3), seen along `directions` (M, 3)."""
        log_density, geo = self.block1(positions)
        return FieldSample(log_density.exp(), self.block2(geo, directions))

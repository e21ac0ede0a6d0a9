"""Radiance fields: block 1 maps position to density and feature, block 2 feature and direction to colour."""

from __future__ import annotations

import abc
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics


class FieldConfig(Config):
    """Options that fields of all kinds share."""

    channels: int = Field(3, ge=1, le=64)  # of what is composited: 3 colours, or those of a latent
    output: Literal["sigmoid", "linear"] = "sigmoid"  # colours lie in [0, 1]; latents lie anywhere
    sh_degree: int = Field(4, ge=1, le=4)
    min_log_density: float = Field(-12.0, ge=-30, le=0)  # the clip range
    max_log_density: float = Field(7.0, gt=0, le=15)
    log_density_shift: float = -1.0  # below zero: training starts thin, light reaches the whole box


class NetworkFieldConfig(FieldConfig):
    """Shape of the two small networks that follow a field's encoding."""

    hidden: int = Field(64, ge=1, le=1024)
    geo_dim: int = Field(15, ge=1, le=256)  # width of the feature between the blocks


class Block1(NamedTuple):
    log_density: Tensor  # (M,), clipped
    geo: Tensor  # (M, F), what block 2 needs beside the direction


class FieldSample(NamedTuple):
    density: Tensor  # (M,), 1/scene unit
    radiance: Tensor  # (M, channels), in [0, 1] where the field's output is a sigmoid


def clip_straight_through(values: Tensor, low: float, high: float) -> Tensor:
    """`values` clipped, with the gradient of the identity, so that a saturated density can come back."""
    return values + (values.clamp(low, high) - values).detach()


def bias_free_mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths without bias, ReLU between them."""
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def build_color_net(config: NetworkFieldConfig) -> nn.Sequential:
    """Block 2 as a network: the direction's basis, then the feature, to channels. Of one shape for all kinds."""
    return bias_free_mlp(config.sh_degree**2 + config.geo_dim, config.hidden, config.hidden, config.channels)


class RadianceField(nn.Module, abc.ABC):
    """A scene in the box [-bound, bound]^3, in two blocks."""

    kind: ClassVar[str]
    Config: ClassVar[type[FieldConfig]] = FieldConfig

    def __init__(self, config: FieldConfig, bound: float) -> None:
        super().__init__()
        self.config, self.bound = config, bound

    @property
    def geo_dim(self) -> int:
        """Width of block 1's feature, where a learned block 2 follows; 0 where features of two kinds do not compare."""
        return 0

    @abc.abstractmethod
    def raw(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density (M,), unshifted and unclipped, and feature (M, F), at positions (M, 3) in [0, 1]^3."""

    @abc.abstractmethod
    def radiance(self, geo: Tensor, basis: Tensor) -> Tensor:
        """Radiance (M, channels) before its activation, from the feature and the directions' SH basis (M, degree^2)."""

    def block1(self, positions: Tensor) -> Block1:
        """Clipped log-density (M,) and feature (M, F) at `positions` (M, 3) in scene units."""
        raw, geo = self.raw((positions + self.bound) / (2 * self.bound))
        shifted = raw.float() + self.config.log_density_shift
        clipped = clip_straight_through(shifted, self.config.min_log_density, self.config.max_log_density)
        return Block1(clipped, geo)

    def block2(self, geo: Tensor, directions: Tensor) -> Tensor:
        """Radiance (M, channels) from block 1's feature and unit `directions` (M, 3)."""
        radiance = self.radiance(geo, spherical_harmonics(directions, self.config.sh_degree)).float()
        return radiance.sigmoid() if self.config.output == "sigmoid" else radiance

    def log_density(self, positions: Tensor) -> Tensor:
        """Log of the density (M,): all that occupancy and meshes need."""
        return self.block1(positions).log_density

    def regularizers(self) -> dict[str, Tensor]:
        """Scalars by name that a training loss may add with a weight; none where the kind has none."""
        return {}

    def occupy(self, occupied: Tensor) -> None:
        """Be told, before training, where the scene is: (G, G, G) bool. A kind that stores cells keeps only those."""

    def forward(self, positions: Tensor, directions: Tensor) -> FieldSample:
        """Density and radiance at `positions` (M, 3), seen along `directions` (M, 3)."""
        log_density, geo = self.block1(positions)
        return FieldSample(log_density.exp(), self.block2(geo, directions))


class ColorNetField(RadianceField):
    """A field whose block 2 is a small network of the feature and the direction; the same for all such kinds."""

    Config: ClassVar[type[NetworkFieldConfig]] = NetworkFieldConfig
    config: NetworkFieldConfig
    color_net: nn.Sequential

    @property
    def geo_dim(self) -> int:
        return self.config.geo_dim

    def radiance(self, geo: Tensor, basis: Tensor) -> Tensor:
        radiance: Tensor = self.color_net(torch.cat([basis, geo], -1))
        return radiance


class NetworkField(ColorNetField):
    """An encoding, then two small networks: `encode` is all that such kinds differ in."""

    def __init__(self, config: NetworkFieldConfig, bound: float, encoding_dim: int) -> None:
        super().__init__(config, bound)
        self.sigma_net = bias_free_mlp(encoding_dim, config.hidden, 1 + config.geo_dim)
        self.color_net = build_color_net(config)

    @abc.abstractmethod
    def encode(self, unit: Tensor) -> Tensor:
        """Encoding (M, E) of positions (M, 3) in [0, 1]^3."""

    def raw(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.sigma_net(self.encode(unit)).float()
        return raw[:, 0], raw[:, 1:]

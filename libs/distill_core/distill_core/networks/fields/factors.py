"""Low-rank fields (Chen et al. 2022, "TensoRF: Tensorial Radiance Fields", arXiv 2203.09517).

    VM:  raw(x, y, z) = sum_r  P_r(x, y) l_r(z) + P'_r(x, z) l'_r(y) + P''_r(y, z) l''_r(x)
    CP:  raw(x, y, z) = sum_r  l_r(x) l'_r(y) l''_r(z)

with planes P and lines l, interpolated linearly. `raw` is the log-density; the feature is a linear map of the products
of factors of its own.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.networks.fields.base import ColorNetField, NetworkFieldConfig, build_color_net

PLANES, LINES = ((0, 1), (0, 2), (1, 2)), (2, 1, 0)  # axes of each plane, and of the line that goes with it


class FactorConfig(NetworkFieldConfig):
    """Resolution and ranks of the factors."""

    resolution: int = Field(64, ge=2, le=1024)  # values per axis; the outermost lie on the box's faces
    density_rank: int = Field(8, ge=1, le=512)
    color_rank: int = Field(16, ge=1, le=1024)


class CPConfig(FactorConfig):
    """The same; a product of three lines says less than one with a plane, so there are more of them."""

    density_rank: int = Field(32, ge=1, le=512)
    color_rank: int = Field(64, ge=1, le=1024)


def sample_planes(planes: Tensor, coordinates: Tensor) -> Tensor:
    """Bilinear values (3, R, M) of `planes` (3, R, H, W) at `coordinates` (3, M, 2) = column, row in [-1, 1]."""
    return F.grid_sample(planes, coordinates[:, :, None], align_corners=True).squeeze(-1)


def sample_lines(lines: Tensor, coordinates: Tensor) -> Tensor:
    """Linear values (3, R, M) of `lines` (3, R, S) at `coordinates` (3, M) in [-1, 1]."""
    on_line = torch.stack([torch.zeros_like(coordinates), coordinates], -1)
    return sample_planes(lines[..., None], on_line)


class FactorField(ColorNetField):
    """Base of VM and CP: products of factors, summed for the density, mapped for the feature."""

    Config: ClassVar[type[FactorConfig]] = FactorConfig
    config: FactorConfig

    def __init__(self, config: FactorConfig, bound: float, factors: dict[str, Tensor], products: int) -> None:
        super().__init__(config, bound)
        self.factors = nn.ParameterDict({name: nn.Parameter(value) for name, value in factors.items()})
        self.basis = nn.Linear(products, config.geo_dim, bias=False)
        self.color_net = build_color_net(config)

    @abc.abstractmethod
    def products(self, part: str, place: Tensor) -> Tensor:
        """Products of the factors of `part` (density or color) at `place` (M, 3) in [-1, 1]^3: (P, M)."""

    def raw(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        place = 2 * unit.float() - 1
        return self.products("density", place).sum(0), self.basis(self.products("color", place).T)

    def regularizers(self) -> dict[str, Tensor]:
        """`density_l1`: how far the density's factors are from zero, the mean of each kind of factor added."""
        density = [value for name, value in self.factors.items() if name.startswith("density")]
        return {"density_l1": torch.stack([3 * value.abs().mean() for value in density]).sum()}


class VMField(FactorField):
    """Vector-matrix decomposition: planes, each times a line along the axis that the plane lacks."""

    kind: ClassVar[str] = "vm"

    def __init__(self, config: FactorConfig, bound: float) -> None:
        size, ranks = config.resolution, {"density": config.density_rank, "color": config.color_rank}
        factors = {f"{part}_planes": 0.1 * torch.randn(3, rank, size, size) for part, rank in ranks.items()}
        factors |= {f"{part}_lines": 0.1 * torch.randn(3, rank, size) for part, rank in ranks.items()}
        super().__init__(config, bound, factors, 3 * config.color_rank)

    def products(self, part: str, place: Tensor) -> Tensor:
        planes = sample_planes(
            self.factors[f"{part}_planes"], torch.stack([place[:, axes] for axes in PLANES])
        )
        lines = sample_lines(self.factors[f"{part}_lines"], place[:, LINES].T)
        return (planes * lines).flatten(0, 1)


class CPField(FactorField):
    """CANDECOMP/PARAFAC decomposition: lines alone. The smallest of all kinds."""

    kind: ClassVar[str] = "cp"
    Config: ClassVar[type[FactorConfig]] = CPConfig

    def __init__(self, config: FactorConfig, bound: float) -> None:
        size, ranks = config.resolution, {"density": config.density_rank, "color": config.color_rank}
        factors = {f"{part}_vectors": 0.2 * torch.randn(3, rank, size) for part, rank in ranks.items()}
        super().__init__(config, bound, factors, config.color_rank)

    def products(self, part: str, place: Tensor) -> Tensor:
        return sample_lines(self.factors[f"{part}_vectors"], place.T).prod(0)

"""Voxel fields: log-density and spherical-harmonic coefficients at the vertices of a grid, no network at all.

    log-density = trilinear(v_0),   colour(d) = sigmoid(sum_k SH_k(d) trilinear(v)_k)

After Plenoxels (Fridovich-Keil et al. 2022, arXiv 2112.05131), with PVD's activations (arXiv 2211.15977): `tensors` is
the dense grid, `sparse` the packed one, where `links[i, j, k]` is a vertex's row, or -1 where nothing is stored.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.networks.fields.base import FieldConfig, RadianceField

INITIAL_STD = 0.02


class TensorsConfig(FieldConfig):
    """Resolution of the grid and bands of its harmonics."""

    resolution: int = Field(64, ge=2, le=512)  # vertices per axis; the outermost lie on the box's faces
    sh_degree: int = Field(3, ge=1, le=4)  # 9 coefficients per channel

    @property
    def values(self) -> int:
        """Numbers per vertex: the density's, then each channel's coefficients."""
        return 1 + self.channels * self.sh_degree**2


class SparseConfig(TensorsConfig):
    """As `TensorsConfig`, and how many vertices are stored; unset: all of them, until `occupy` says which."""

    capacity: int | None = Field(None, ge=1, le=2**27)


class VoxelField(RadianceField):
    """Base of the dense and the packed grid. Block 1's feature is the coefficients, so features do not compare."""

    config: TensorsConfig

    def radiance(self, geo: Tensor, basis: Tensor) -> Tensor:
        coefficients = geo.unflatten(-1, (self.config.channels, -1))
        radiance: Tensor = (coefficients * basis[:, None]).sum(-1)
        return radiance


class TensorsField(VoxelField):
    """The dense grid. Trains fast per step; its size, hence its optimiser's time, grows with the box's volume."""

    kind: ClassVar[str] = "tensors"
    Config: ClassVar[type[TensorsConfig]] = TensorsConfig

    def __init__(self, config: TensorsConfig, bound: float) -> None:
        super().__init__(config, bound)
        size = config.resolution
        self.grid = nn.Parameter(INITIAL_STD * torch.randn(1, config.values, size, size, size))  # z, y, x

    def raw(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        place = (2 * unit.float() - 1)[None, :, None, None]
        values = F.grid_sample(self.grid, place, align_corners=True).reshape(self.config.values, -1).T
        return values[:, 0], values[:, 1:]

    def regularizers(self) -> dict[str, Tensor]:
        """`total_variation`: mean squared difference of neighbouring vertices, over all values and axes."""
        steps = [self.grid.diff(dim=axis).square().mean() for axis in (2, 3, 4)]
        return {"total_variation": torch.stack(steps).sum()}


class SparseField(VoxelField):
    """The packed grid: memory and training time of what is occupied alone, and equal to the dense grid there."""

    kind: ClassVar[str] = "sparse"
    Config: ClassVar[type[SparseConfig]] = SparseConfig
    config: SparseConfig
    links: Tensor

    def __init__(self, config: SparseConfig, bound: float) -> None:
        super().__init__(config, bound)
        vertices = config.resolution**3
        if config.capacity is not None and config.capacity > vertices:
            raise ConfigError(
                f"capacity {config.capacity} is more than the {vertices} vertices of resolution "
                f"{config.resolution}; lower it",
                field="network.args.capacity",
            )
        rows = config.capacity or vertices
        self.rows = nn.Parameter(INITIAL_STD * torch.randn(rows, config.values))
        links = torch.full((vertices,), -1, dtype=torch.int32)
        links[:rows] = torch.arange(rows, dtype=torch.int32)
        self.register_buffer("links", links.reshape(3 * (config.resolution,)))  # x, y, z

    @classmethod
    def packed(cls, field: TensorsField, occupied: Tensor) -> SparseField:
        """The values of a dense `field` at the corners of every voxel that meets an `occupied` (G, G, G) cell."""
        sparse = cls(SparseConfig(**field.config.model_dump()), field.bound)
        sparse.occupy(occupied)
        sparse.copy_dense(field)
        return sparse

    def copy_dense(self, field: TensorsField) -> None:
        """Take the values of a dense field of the same shape at the vertices stored here."""
        stored = self.links >= 0
        with torch.no_grad():
            self.rows.copy_(field.grid[0].permute(3, 2, 1, 0)[stored])  # to x, y, z, value

    @torch.no_grad()
    def occupy(self, occupied: Tensor) -> None:
        """Store only the vertices that a sample in an `occupied` cell reads; rows that stay keep their values."""
        kept = touched_vertices(occupied, self.config.resolution).to(self.links.device) & (self.links >= 0)
        if not bool(kept.any()):
            raise ConfigError(
                "no cell of the scene is occupied, so nothing is left to store; use a trained scene"
            )
        self.rows = nn.Parameter(self.rows[self.links[kept].long()], requires_grad=self.rows.requires_grad)
        self.links[~kept] = -1
        self.links[kept] = torch.arange(len(self.rows), dtype=torch.int32, device=self.links.device)
        self.config = self.config.model_copy(update={"capacity": len(self.rows)})

    def raw(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.resolution
        place = unit.float().clamp(0, 1) * (size - 1)
        low = place.floor().clamp_max(size - 2)
        both = torch.stack([1 - (place - low), place - low], -1)  # (M, 3, 2) linear weights
        weight = (both[:, 0, :, None, None] * both[:, 1, None, :, None] * both[:, 2, None, None, :]).flatten(
            1
        )
        row = self.links.reshape(-1)[self._corners(low.long())].long()  # (M, 8)
        weight = weight * (row >= 0)
        values = (self.rows[row.clamp_min(0)] * weight[..., None]).sum(1)
        empty = (1 - weight.sum(1)) * (self.config.min_log_density - self.config.log_density_shift)
        return values[:, 0] + empty, values[:, 1:]

    def _corners(self, low: Tensor) -> Tensor:
        """Flat vertex indices (M, 8) of the voxel at `low` (M, 3); z varies fastest."""
        size = self.config.resolution
        both = torch.stack([low, low + 1], -1)
        x, y, z = both[:, 0] * size**2, both[:, 1] * size, both[:, 2]
        return (x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]).flatten(1)


def touched_vertices(occupied: Tensor, resolution: int) -> Tensor:
    """Vertices (V, V, V), V = `resolution`, at a corner of a voxel that meets a cell of `occupied` (G, G, G)."""
    cells, voxels = len(occupied), resolution - 1
    index = torch.arange(voxels, device=occupied.device)
    first, last = index * cells // voxels, ((index + 1) * cells - 1) // voxels
    met = occupied
    for axis in range(3):
        total = F.pad(met.transpose(0, axis).int().cumsum(0), (0, 0, 0, 0, 1, 0))
        met = ((total[last + 1] - total[first]) > 0).transpose(0, axis)
    dilated = F.max_pool3d(F.pad(met[None].float(), (1, 1, 1, 1, 1, 1)), 2, stride=1)
    return dilated[0] > 0

"""Hash-grid field (Müller et al. 2022, "Instant Neural Graphics Primitives", arXiv 2201.05989)."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.networks.fields.base import NetworkField, NetworkFieldConfig

# pi_2 = 2654435761 as the int32 with the same bits: products wrap around exactly as unsigned ones do.
PRIMES = (1, 2654435761 - 2**32, 805459861)


class HashConfig(NetworkFieldConfig):
    levels: int = Field(6, ge=1, le=24)
    features: int = Field(2, ge=1, le=8)  # per level
    min_resolution: int = Field(8, ge=2, le=4096)
    max_resolution: int = Field(96, ge=2, le=65536)
    log2_table_size: int = Field(
        15, ge=4, le=22
    )  # entries per level; above 15 the optimiser dominates on a CPU

    @model_validator(mode="after")
    def _ordered(self) -> HashConfig:
        if self.max_resolution < self.min_resolution:
            raise ValueError(
                f"max_resolution {self.max_resolution} is below min_resolution {self.min_resolution}"
            )
        return self


class Level(NamedTuple):
    scale: float
    resolution: int  # vertices per axis; a dense level strides by resolution + 1
    dense: bool
    offset: int  # of its first entry in the common table
    length: int


def table_levels(config: HashConfig) -> list[Level]:
    """Geometry of each level by tiny-cuda-nn's rules: dense while it fits, lengths a multiple of 8."""
    growth = (config.max_resolution / config.min_resolution) ** (1 / max(config.levels - 1, 1))
    levels: list[Level] = []
    offset = 0
    for index in range(config.levels):
        scale = config.min_resolution * growth**index - 1
        resolution = math.ceil(scale - 1e-6) + 1  # the power may end a hair above a whole number
        vertices, most = (resolution + 1) ** 3, 2**config.log2_table_size
        length = math.ceil(vertices / 8) * 8 if vertices <= most else most
        levels.append(Level(scale, resolution, vertices <= most, offset, length))
        offset += length
    return levels


def corner_indices(corner: Tensor, level: Level) -> Tensor:
    """Table entries (8, M) of the corners of the cell at `corner` (3, M) int32; x varies fastest."""
    both = torch.stack([corner, corner + 1], 1)  # (3, 2, M)
    if level.dense:
        stride = level.resolution + 1
        x, y, z = both[0], both[1] * stride, both[2] * stride**2
        index = z[:, None, None] + y[None, :, None] + x[None, None, :]
    else:
        x, y, z = both[0], both[1] * PRIMES[1], both[2] * PRIMES[2]
        index = (z[:, None, None] ^ y[None, :, None] ^ x[None, None, :]) & (level.length - 1)
    return index.flatten(0, 2) + level.offset


def corner_weights(fraction: Tensor) -> Tensor:
    """Trilinear weights (..., 8, M) in the order of `corner_indices`, from the position in the cell (3, ..., M)."""
    x, y, z = torch.stack([1 - fraction, fraction], -2)  # (..., 2, M) each
    products: Tensor = z[..., :, None, None, :] * y[..., None, :, None, :] * x[..., None, None, :, :]
    return products.flatten(-4, -2)


def runs_triton(device: torch.device) -> bool:
    """Whether the encoding's Triton kernels (hash_triton.py) can be had on `device`: on CUDA, after a self-test."""
    return device.type == "cuda" and _triton_works(device)


# What `torch.compiler.assume_constant_result` does, which loads the whole compiler: a second at the start of each job.
runs_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _triton_works(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from distill_core.networks.fields import hash_triton

    return hash_triton.works(device)


class HashField(NetworkField):
    """Multi-resolution hash tables, interpolated and concatenated. The fastest kind to train from images."""

    kind: ClassVar[str] = "hash"
    Config: ClassVar[type[HashConfig]] = HashConfig

    def __init__(self, config: HashConfig, bound: float) -> None:
        super().__init__(config, bound, config.levels * config.features)
        self.levels = table_levels(config)
        last = self.levels[-1]
        self.table = nn.Parameter(
            torch.empty(last.offset + last.length, config.features).uniform_(-1e-4, 1e-4)
        )

    def encode(self, unit: Tensor) -> Tensor:
        if runs_triton(self.table.device):
            from distill_core.networks.fields import hash_triton

            return hash_triton.encode(unit, self.table, self.levels)
        # Points lie along the last axis: on a CPU every step then runs through whole vectors, four times as fast.
        scale = unit.new_tensor([level.scale for level in self.levels])
        position = unit.clamp(0, 1).T[:, None] * scale[:, None] + 0.5  # (3, L, M)
        corner = position.floor()
        inside = ((unit >= 0) & (unit <= 1)).all(-1)  # outside the box the encoding is zero
        weight = corner_weights(position - corner) * inside  # (L, 8, M)
        cells = zip(corner.int().unbind(1), self.levels)
        index = torch.stack([corner_indices(cell, level) for cell, level in cells]).flatten()
        # One 1-D gather per feature: on a CPU its gradient is eight times as fast as that of (E, F) rows.
        entries = [column.index_select(0, index) for column in self.table.unbind(1)]
        columns = [(entry.view_as(weight) * weight).sum(1) for entry in entries]
        return torch.stack(columns, 1).flatten(0, 1).T  # (M, L x F)

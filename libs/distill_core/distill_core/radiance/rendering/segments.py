"""Rays to colour, distance and opacity, some samples at a time, without rays that no light passes any more.

    out = sum_s T_s out_s,   T_{s+1} = T_s (1 - opacity_s)           for segments s along the ray
    normal_i = -grad log density / |grad log density|                by central differences, at sample i

Rays of several pictures run through the field together, each picture's samples filled up to whole blocks of rows: on
a CPU the last digits of a matrix product's or a sigmoid's row depend on where in its block the row lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.rendering.march import Samples, march
from distill_core.radiance.rendering.quadrature import composite, packed_weights

if TYPE_CHECKING:
    from distill_core.networks.fields import RadianceField

STOP_TRANSMITTANCE = 1e-4  # a ray with less light left is finished
SEGMENT = 4  # samples per ray between two looks at what is left
BLOCK = 64  # rows: a multiple of the widest vector and of the tiles of matrix products


def render_samples(field: nn.Module, rays: Rays, samples: Samples) -> Tensor:
    """Colour, distance and opacity (R, C + 2) of each ray from all its samples at once; with gradients."""
    density, radiance = field(samples.positions, rays.directions[samples.ray])
    return _composited(density, radiance, samples)


def density_normals(log_density: Callable[[Tensor], Tensor], positions: Tensor, step: float) -> Tensor:
    """Unit vectors (M, 3), world axes, down the log-density's slope at `positions` (M, 3); 0 where it is level.

    By central differences over `step` scene units to either side: the marching step finds even a solid's surface.
    """
    shifts = step * torch.eye(3, device=positions.device)
    slope = [log_density(positions - shift) - log_density(positions + shift) for shift in shifts]
    return nn.functional.normalize(torch.stack(slope, -1), dim=-1)


def render_tiles(
    field: RadianceField,
    tiles: Sequence[Rays],
    *,
    bound: float,
    num_steps: int,
    occupied: Tensor | None,
    normals: bool = False,
) -> list[Tensor]:
    """Colour, distance, opacity and, if asked for, normal (R, C + 2 or C + 5) of the rays of each tile.

    On a CPU with one thread a tile's result is bit for bit the same whatever tiles it is rendered with.
    """
    sizes = [len(tile.origins) for tile in tiles]
    rays = Rays(*(torch.cat(parts) for parts in zip(*tiles)))
    samples = march(rays, bound=bound, num_steps=num_steps, occupied=occupied)
    counts = torch.bincount(samples.ray, minlength=samples.num_rays)
    before = counts.cumsum(0) - counts
    device = rays.origins.device
    tile = torch.arange(len(tiles), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    light = torch.ones(samples.num_rays, device=device)
    out: Tensor | None = None
    for first in range(0, int(counts.max()), SEGMENT):
        active = ((counts > first) & (light > STOP_TRANSMITTANCE)).nonzero().squeeze(-1)
        if len(active) == 0:
            break
        steps = first + torch.arange(SEGMENT, device=device)
        row, rank = (steps < counts[active, None]).nonzero(as_tuple=True)
        chosen = before[active[row]] + first + rank
        segment = Samples(
            samples.positions.index_select(0, chosen),
            samples.distance[chosen],
            row,
            rank,
            samples.delta,
            len(active),
        )
        seen = Rays(rays.origins[active], rays.directions[active])
        passed = _render_blocks(field, seen, segment, tile[active[row]], len(tiles), normals)
        if out is None:
            out = torch.zeros(samples.num_rays, passed.shape[1], device=device)
        out[active] += light[active, None] * passed
        light[active] *= 1 - passed[:, -4 if normals else -1]
    if out is None:  # nothing in sight
        out = torch.zeros(samples.num_rays, _channels(field, device) + 2 + 3 * normals, device=device)
    return list(out.split(sizes))


def _render_blocks(
    field: RadianceField, rays: Rays, samples: Samples, tile: Tensor, num_tiles: int, normals: bool
) -> Tensor:
    """`render_samples`, each tile's samples in whole blocks; `tile` (M,) ascends."""
    place, slots = _blocks(tile, num_tiles)
    positions = samples.positions.index_select(0, slots)
    directions = rays.directions.index_select(0, samples.ray.index_select(0, slots))
    density, radiance = field(positions, directions)
    slope = density_normals(field.log_density, positions, samples.delta)[place] if normals else None
    return _composited(density[place], radiance[place], samples, slope)


def _blocks(tile: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """Row (M,) of each sample in the filled-up batch, and the sample (P,) that each row holds."""
    counts = torch.bincount(tile, minlength=num_tiles)
    filled = (counts + BLOCK - 1) // BLOCK * BLOCK
    gap = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)
    sample = torch.arange(len(tile), device=tile.device)
    place = sample + gap[tile]
    slots = sample.new_zeros(int(filled.sum()))
    slots[place] = sample
    return place, slots


def _composited(density: Tensor, radiance: Tensor, samples: Samples, normals: Tensor | None = None) -> Tensor:
    weights = packed_weights(density, samples)
    channels = [radiance, samples.distance[:, None], torch.ones_like(weights)[:, None]]
    return composite(weights, torch.cat(channels if normals is None else [*channels, normals], -1), samples)


def _channels(field: nn.Module, device: torch.device) -> int:
    """Number of channels that the field composites, by its output for a block of points."""
    somewhere = torch.zeros(BLOCK, 3, device=device)
    _, radiance = field(somewhere, somewhere)
    return int(radiance.shape[-1])

"""Ray marching: equal steps inside the scene's box, kept only where the occupancy grid is set, packed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.radiance.cameras.camera import Rays
from distill_core.radiance.rendering.occupancy import is_occupied

MIN_NEAR = 0.05  # scene units: no sample lies closer to the camera


class Samples(NamedTuple):
    """Packed samples, ordered by ray and then by distance; M in all, for `num_rays` rays."""

    positions: Tensor  # (M, 3)
    distance: Tensor  # (M,)
    ray: Tensor  # (M,) which ray
    rank: Tensor  # (M,) how many kept samples lie before it on its ray
    delta: float  # length of every interval, scene units
    num_rays: int


def step_length(bound: float, num_steps: int) -> float:
    """Interval with which `num_steps` samples span the diagonal of the box [-bound, bound]^3."""
    return 2 * math.sqrt(3) * bound / num_steps


def box_interval(
    rays: Rays, bound: float, corners: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Distances (R,) at which rays enter and leave a box; a ray that misses has near >= far.

    The box is [-bound, bound]^3, or between the lowest and the highest of `corners`, (3,) each.
    """
    low, high = corners or (-bound, bound)
    inverse = 1 / torch.where(rays.directions.abs() < 1e-9, 1e-9, rays.directions)
    one, other = (low - rays.origins) * inverse, (high - rays.origins) * inverse
    return torch.minimum(one, other).amax(-1).clamp_min(MIN_NEAR), torch.maximum(one, other).amin(-1)


def occupied_extent(occupied: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest corner (3,) of the set cells, a little beyond them; low above high where none is set."""
    as_bytes = occupied.view(
        torch.uint8
    )  # whose maxima take a fiftieth of the time that `any` of bools takes
    above = as_bytes.amax(0)
    used = torch.stack([as_bytes.amax(1).amax(1), above.amax(1), above.amax(0)]).bool()
    cells = torch.arange(len(occupied), device=occupied.device)
    size, slack = 2 * bound / len(occupied), 0.01  # of a cell: rounding puts a point into its neighbour's
    low = torch.where(used, cells, len(occupied)).amin(1)
    high = torch.where(used, cells + 1, 0).amax(1)
    return (low - slack) * size - bound, (high + slack) * size - bound


def march(
    rays: Rays, *, bound: float, num_steps: int, occupied: Tensor | None, offset: Tensor | float = 0.5
) -> Samples:
    """Samples of `rays` at `near + (i + offset) * step_length`, inside the box and in occupied cells.

    `occupied` (G, G, G) bool, or None for a full grid; `offset` in [0, 1), one for all or one per ray (R,).
    """
    delta = step_length(bound, num_steps)
    near, far = box_interval(rays, bound)
    start = near + torch.as_tensor(offset, device=near.device) * delta
    column = torch.arange(num_steps, device=near.device) * delta
    first, last = near, far
    if occupied is not None:  # most rays cross little of the set cells' own box
        first, last = box_interval(rays, bound, occupied_extent(occupied, bound))
    low = ((first - start) / delta).floor().clamp(0, num_steps)
    high = ((torch.minimum(last, far) - start) / delta).ceil().clamp(0, num_steps)
    num_candidates = (high - low).clamp_min(0).long()
    ray = torch.arange(len(near), device=near.device).repeat_interleave(num_candidates)
    skipped = low.long() - (num_candidates.cumsum(0) - num_candidates)
    # index_select is three times as fast as indexing on a CPU
    step = skipped.index_select(0, ray) + torch.arange(len(ray), device=ray.device)
    distance = start.index_select(0, ray) + column.index_select(0, step)
    origins, directions = (part.contiguous().index_select(0, ray) for part in rays)  # expanded: slow
    positions = torch.addcmul(origins, directions, distance[:, None])
    if occupied is not None:
        kept = is_occupied(occupied, positions, bound).nonzero().squeeze(-1)
        ray, distance, positions = (part.index_select(0, kept) for part in (ray, distance, positions))
    counts = torch.bincount(ray, minlength=len(near))
    before = (counts.cumsum(0) - counts).index_select(0, ray)
    rank = torch.arange(len(ray), device=ray.device) - before
    return Samples(positions, distance, ray, rank, delta, len(near))


def fit_budget(samples: Samples, budget: int) -> Samples:
    """The samples of the first rays that have at most `budget` samples in all (never fewer than one ray)."""
    counts = torch.bincount(samples.ray, minlength=samples.num_rays)
    num_rays = max(int((counts.cumsum(0) <= budget).sum()), min(1, samples.num_rays))
    kept = int(counts[:num_rays].sum())
    positions, distance, ray, rank = (value[:kept] for value in samples[:4])
    return Samples(positions, distance, ray, rank, samples.delta, num_rays)

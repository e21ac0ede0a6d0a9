"""Ray marching: equal steps inside the scene's box, kept only where the occupancy grid is set, packed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.radiance.cameras import Rays
from distill_core.radiance.occupancy import is_occupied

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


def box_interval(rays: Rays, bound: float) -> tuple[Tensor, Tensor]:
    """Distances (R,) at which rays enter and leave [-bound, bound]^3; a ray that misses has near >= far."""
    inverse = 1 / torch.where(rays.directions.abs() < 1e-9, 1e-9, rays.directions)
    one, other = (-bound - rays.origins) * inverse, (bound - rays.origins) * inverse
    return torch.minimum(one, other).amax(-1).clamp_min(MIN_NEAR), torch.maximum(one, other).amin(-1)


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
    ray, step = (start[:, None] + column < far[:, None]).nonzero(as_tuple=True)
    distance = start[ray] + column[step]
    positions = torch.addcmul(rays.origins[ray], rays.directions[ray], distance[:, None])
    if occupied is not None:
        kept = is_occupied(occupied, positions, bound).nonzero().squeeze(-1)
        ray, distance, positions = ray[kept], distance[kept], positions[kept]
    counts = torch.bincount(ray, minlength=len(near))
    rank = torch.arange(len(ray), device=ray.device) - (counts.cumsum(0) - counts)[ray]
    return Samples(positions, distance, ray, rank, delta, len(near))


def fit_budget(samples: Samples, budget: int) -> Samples:
    """The samples of the first rays that have at most `budget` samples in all (never fewer than one ray)."""
    counts = torch.bincount(samples.ray, minlength=samples.num_rays)
    num_rays = max(int((counts.cumsum(0) <= budget).sum()), min(1, samples.num_rays))
    kept = int(counts[:num_rays].sum())
    positions, distance, ray, rank = (value[:kept] for value in samples[:4])
    return Samples(positions, distance, ray, rank, samples.delta, num_rays)

"""Spheres that lie on a slab, met by rays in closed form: the geometry of the analytic scenes that are not checkers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.radiance.cameras.camera import Camera, Rays

BOUND = 1.0
SLAB_HALF, SLAB_TOP, SLAB_BOTTOM = 0.92, -0.5, -0.6
NOTHING, SLAB = -1, 0  # parts; sphere k is 1 + k


class Surface(NamedTuple):
    """First hit of each of R rays."""

    positions: Tensor  # (R, 3); anywhere where nothing is met
    normals: Tensor  # (R, 3), outward, unit length
    part: Tensor  # (R,) int64: NOTHING, SLAB, or 1 + the sphere's number


def resting(centres: Tensor, radii: Tensor) -> Tensor:
    """Spheres (K, 4), centre and radius, of `radii` (K,) that lie on the slab at `centres` (K, 2)."""
    return torch.cat([centres, (SLAB_TOP + radii)[:, None], radii[:, None]], -1)


def first_surface(rays: Rays, spheres: Tensor) -> Surface:
    """The nearest of the slab and the `spheres` (K, 4) along each ray."""
    slab_distance, slab_normals = _meet_slab(rays)
    distances = torch.stack([slab_distance, *(_meet_sphere(rays, sphere) for sphere in spheres)], -1)
    nearest, part = distances.min(-1)
    met = nearest.isfinite()
    positions = rays.origins + rays.directions * torch.where(met, nearest, 0.0)[:, None]
    normals = slab_normals
    for index, sphere in enumerate(spheres):
        outward = (positions - sphere[:3]) / sphere[3]
        normals = torch.where((part == 1 + index)[:, None], outward, normals)
    return Surface(positions, normals, torch.where(met, part, NOTHING))


def fine_camera(camera: Camera, supersample: int) -> Camera:
    """`camera` with supersample^2 pixels in each of its own."""
    n = supersample
    lens = (camera.distortion, camera.fisheye)
    focal = (camera.fx * n, camera.fy * n, camera.cx * n, camera.cy * n)
    return Camera(camera.c2w, *focal, camera.width * n, camera.height * n, *lens)


def pooled(values: Tensor, camera: Camera, supersample: int) -> Tensor:
    """Means (H, W, C) over the pixels of `camera` of values (R, C) by the rays of its `fine_camera`."""
    n = supersample
    return values.reshape(camera.height, n, camera.width, n, -1).mean(dim=(1, 3))


def _meet_sphere(rays: Rays, sphere: Tensor) -> Tensor:
    towards = sphere[:3] - rays.origins
    along = (towards * rays.directions).sum(-1)
    inside = sphere[3] ** 2 - (towards.square().sum(-1) - along.square())
    distance = along - inside.clamp_min(0).sqrt()
    return torch.where((inside > 0) & (distance > 0), distance, torch.inf)


def _meet_slab(rays: Rays) -> tuple[Tensor, Tensor]:
    low = rays.origins.new_tensor([-SLAB_HALF, -SLAB_HALF, SLAB_BOTTOM])
    high = rays.origins.new_tensor([SLAB_HALF, SLAB_HALF, SLAB_TOP])
    inverse = 1 / torch.where(rays.directions.abs() < 1e-9, 1e-9, rays.directions)
    one, other = (low - rays.origins) * inverse, (high - rays.origins) * inverse
    near, axis = torch.minimum(one, other).max(-1)
    far = torch.maximum(one, other).amin(-1)
    normals = torch.nn.functional.one_hot(axis, 3) * -rays.directions.sign()
    return torch.where((near < far) & (near > 0), near, torch.inf), normals

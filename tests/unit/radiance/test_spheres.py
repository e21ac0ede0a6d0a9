"""The geometry in closed form against sphere tracing of its signed distance."""

import torch
import torch.nn.functional as F

from distill_core.radiance.analytic.spheres import (
    NOTHING,
    SLAB,
    SLAB_BOTTOM,
    SLAB_HALF,
    SLAB_TOP,
    fine_camera,
    first_surface,
    pooled,
    resting,
)
from distill_core.radiance.cameras.camera import Rays, orbit_camera

SPHERES = resting(torch.tensor([[-0.4, -0.2], [0.4, 0.1]]), torch.tensor([0.4, 0.3]))


def signed_distances(positions):
    """(M, 3): slab, first sphere, second sphere."""
    half = torch.tensor([SLAB_HALF, SLAB_HALF, (SLAB_TOP - SLAB_BOTTOM) / 2])
    beyond = (positions - torch.tensor([0, 0, (SLAB_TOP + SLAB_BOTTOM) / 2])).abs() - half
    slab = beyond.clamp_min(0).norm(dim=-1) + beyond.amax(-1).clamp_max(0)
    return torch.stack([slab, *((positions - s[:3]).norm(dim=-1) - s[3] for s in SPHERES)], -1)


def test_rays_meet_what_sphere_tracing_meets():
    rays = orbit_camera(40, 25, 3, fov_degrees=42, width=48, height=48).rays()
    surface = first_surface(rays, SPHERES)
    distance = torch.zeros(len(rays.origins))
    for _ in range(400):
        free = signed_distances(rays.origins + distance[:, None] * rays.directions).amin(-1)
        distance += free.clamp_max(1.0)
    met = free < 1e-3
    assert ((surface.part != NOTHING) == met).float().mean() > 0.995  # but for grazing rays
    both = met & (surface.part != NOTHING)
    positions = (rays.origins + distance[:, None] * rays.directions)[both]
    near = (surface.positions[both] - positions).norm(dim=-1) < 5e-3
    assert near.float().mean() > 0.99
    part = signed_distances(surface.positions[both]).abs().argmin(-1)
    assert (part == surface.part[both]).float().mean() > 0.99


def test_normals_are_outward_unit_and_the_distance_s_gradient():
    rays = orbit_camera(200, 35, 3, fov_degrees=42, width=40, height=40).rays()
    surface = first_surface(rays, SPHERES)
    met = surface.part != NOTHING
    torch.testing.assert_close(
        surface.normals[met].norm(dim=-1), torch.ones(int(met.sum())), atol=1e-4, rtol=0
    )
    assert ((surface.normals * rays.directions).sum(-1)[met] <= 0).all()
    step = 1e-3
    sides = [
        signed_distances(surface.positions[met] + shift).amin(-1)
        - signed_distances(surface.positions[met] - shift).amin(-1)
        for shift in step * torch.eye(3)
    ]
    agreement = (F.normalize(torch.stack(sides, -1), dim=-1) * surface.normals[met]).sum(-1)
    assert (agreement > 0.99).float().mean() > 0.97  # but for edges


def test_spheres_rest_on_the_slab_and_hide_it():
    torch.testing.assert_close(SPHERES[:, 2] - SPHERES[:, 3], torch.full((2,), SLAB_TOP))
    down = Rays(
        torch.tensor([[-0.4, -0.2, 3.0], [0.9, -0.9, 3.0], [3.0, 0, 3.0]]), torch.tensor([[0, 0, -1.0]] * 3)
    )
    surface = first_surface(down, SPHERES)
    assert surface.part.tolist() == [1, SLAB, NOTHING]
    torch.testing.assert_close(surface.positions[1], torch.tensor([0.9, -0.9, SLAB_TOP]))


def test_fine_rays_average_to_the_camera_s_pixels():
    camera = orbit_camera(10, 20, 3, fov_degrees=42, width=6, height=4)
    directions = pooled(fine_camera(camera, 3).rays().directions, camera, 3)
    found = F.normalize(directions.reshape(-1, 3), dim=-1)
    torch.testing.assert_close(found, camera.rays().directions, atol=2e-3, rtol=0)

"""A scene in closed form, sphere, box and torus with checkers: data that needs no download, and an oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill_core.radiance.cameras.camera import Camera, Rays
from distill_core.radiance.rendering.march import box_interval

BOUND = 1.0  # the scene lies in [-1, 1]^3
SPHERE_CENTRE, SPHERE_RADIUS = (-0.45, -0.35, 0.05), 0.38
BOX_CENTRE, BOX_HALF = (0.42, -0.38, -0.03), (0.3, 0.26, 0.3)
TORUS_CENTRE, TORUS_RADIUS, TORUS_TUBE = (0.0, 0.42, -0.05), 0.38, 0.15
COLOURS = (  # the two colours of each object's checker
    ((0.85, 0.2, 0.15), (0.95, 0.75, 0.3)),
    ((0.15, 0.35, 0.8), (0.75, 0.85, 0.95)),
    ((0.1, 0.6, 0.35), (0.85, 0.9, 0.35)),
)
CHECKER = 5.0  # squares per unit
LIGHT = (0.48, 0.36, 0.8)
AMBIENT, DIFFUSE, SPECULAR, SHININESS = 0.45, 0.5, 0.35, 24
MAX_TRACE_STEPS, HIT_DISTANCE = 64, 1e-3

Distances = Callable[[Tensor], Tensor]  # positions (M, 3) to signed distances (M, objects)


def box_distance(
    positions: Tensor, centre: tuple[float, float, float], half: tuple[float, float, float]
) -> Tensor:
    """Signed distance (M,) to a box with half sides `half`."""
    beyond = (positions - positions.new_tensor(centre)).abs() - positions.new_tensor(half)
    outside: Tensor = beyond.clamp_min(0).norm(dim=-1)
    return outside + beyond.amax(-1).clamp_max(0)


def signed_distances(positions: Tensor) -> Tensor:
    """Distance (M, 3) of `positions` (M, 3) to the sphere, the box and the torus; negative inside."""
    sphere = (positions - positions.new_tensor(SPHERE_CENTRE)).norm(dim=-1) - SPHERE_RADIUS
    box = box_distance(positions, BOX_CENTRE, BOX_HALF)
    p = positions - positions.new_tensor(TORUS_CENTRE)
    torus = torch.hypot(p[:, :2].norm(dim=-1) - TORUS_RADIUS, p[:, 2]) - TORUS_TUBE
    return torch.stack([sphere, box, torus], -1)


def surface_normals(positions: Tensor, step: float = 1e-3, distances: Distances = signed_distances) -> Tensor:
    """Unit outward normals (M, 3) of the nearest object, by central differences."""
    shifts = step * torch.eye(3, device=positions.device)
    sides = [
        distances(positions + shift).amin(-1) - distances(positions - shift).amin(-1) for shift in shifts
    ]
    return nn.functional.normalize(torch.stack(sides, -1), dim=-1)


def shade(positions: Tensor, directions: Tensor) -> Tensor:
    """Colour (M, 3) of the surface nearest to `positions`: checker, Lambert and a Blinn-Phong highlight."""
    which = signed_distances(positions).abs().argmin(-1)
    square = (positions * CHECKER).floor().sum(-1).long() % 2
    albedo = torch.tensor(COLOURS, device=positions.device)[which, square]
    return lit(albedo, surface_normals(positions), directions)


def lit(albedo: Tensor, normals: Tensor, directions: Tensor) -> Tensor:
    """`albedo` (M, 3) under the light, seen along `directions` (M, 3): Lambert and a Blinn-Phong highlight."""
    light = nn.functional.normalize(normals.new_tensor(LIGHT), dim=0)
    halfway = nn.functional.normalize(light - directions, dim=-1)
    lambert = (normals @ light).clamp_min(0)[:, None]
    highlight = (normals * halfway).sum(-1).clamp_min(0)[:, None] ** SHININESS
    return (albedo * (AMBIENT + DIFFUSE * lambert) + SPECULAR * highlight).clamp(0, 1)


def first_hits(rays: Rays) -> tuple[Tensor, Tensor]:
    """By sphere tracing: distance (R,) to what each ray hits first, 0 where nothing, and whether it hits (R,)."""
    near, far = box_interval(rays, BOUND)
    hit = torch.zeros(len(near), dtype=torch.bool, device=near.device)
    distance = near.clone()
    active = (near < far).nonzero().squeeze(-1)
    for _ in range(MAX_TRACE_STEPS):
        positions = rays.origins[active] + distance[active, None] * rays.directions[active]
        free = signed_distances(positions).amin(-1)
        distance[active] += free
        hit[active] = free < HIT_DISTANCE
        active = active[(free >= HIT_DISTANCE) & (distance[active] < far[active])]
        if len(active) == 0:
            break
    return distance * hit, hit


def trace(rays: Rays) -> Tensor:
    """First hit of each ray: colour and opacity (R, 4), all 0 where nothing is hit."""
    distance, hits = first_hits(rays)
    out = torch.zeros(len(distance), 4, device=distance.device)
    hit = hits.nonzero().squeeze(-1)
    out[hit, 3] = 1
    out[hit, :3] = shade(rays.origins[hit] + distance[hit, None] * rays.directions[hit], rays.directions[hit])
    return out


def render_procedural(camera: Camera, supersample: int = 2) -> Tensor:
    """The scene through `camera`: (H, W, 4), colour times opacity, mean of supersample^2 rays per pixel."""
    n = supersample
    fine = Camera(
        camera.c2w,
        camera.fx * n,
        camera.fy * n,
        camera.cx * n,
        camera.cy * n,
        camera.width * n,
        camera.height * n,
        camera.distortion,
        camera.fisheye,
    )
    picture = trace(fine.rays()).reshape(camera.height, n, camera.width, n, 4)
    return picture.mean(dim=(1, 3))


def procedural_distance(camera: Camera) -> Tensor:
    """Distance of what the centre of each pixel shows: (H, W), scene units, 0 where it shows nothing."""
    return first_hits(camera.rays())[0].reshape(camera.height, camera.width)

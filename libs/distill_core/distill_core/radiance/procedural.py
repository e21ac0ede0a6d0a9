"""A scene in closed form, sphere, box and torus with checkers: data that needs no download, and an oracle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_core.networks.fields.base import FieldSample
from distill_core.radiance.cameras import Camera, Rays
from distill_core.radiance.march import box_interval

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
SOLID_DENSITY = 400.0  # of the field form: 1/unit inside, 0 outside


def signed_distances(positions: Tensor) -> Tensor:
    """Distance (M, 3) of `positions` (M, 3) to the sphere, the box and the torus; negative inside."""

    def from_centre(centre: tuple[float, float, float]) -> Tensor:
        return positions - positions.new_tensor(centre)

    sphere = from_centre(SPHERE_CENTRE).norm(dim=-1) - SPHERE_RADIUS
    beyond = from_centre(BOX_CENTRE).abs() - positions.new_tensor(BOX_HALF)
    box = beyond.clamp_min(0).norm(dim=-1) + beyond.amax(-1).clamp_max(0)
    p = from_centre(TORUS_CENTRE)
    torus = torch.hypot(p[:, :2].norm(dim=-1) - TORUS_RADIUS, p[:, 2]) - TORUS_TUBE
    return torch.stack([sphere, box, torus], -1)


def surface_normals(positions: Tensor, step: float = 1e-3) -> Tensor:
    """Unit outward normals (M, 3) of the nearest object, by central differences."""
    shifts = step * torch.eye(3, device=positions.device)
    sides = [
        signed_distances(positions + shift).amin(-1) - signed_distances(positions - shift).amin(-1)
        for shift in shifts
    ]
    return nn.functional.normalize(torch.stack(sides, -1), dim=-1)


def shade(positions: Tensor, directions: Tensor) -> Tensor:
    """Colour (M, 3) of the surface nearest to `positions`: checker, Lambert and a Blinn-Phong highlight."""
    which = signed_distances(positions).abs().argmin(-1)
    square = (positions * CHECKER).floor().sum(-1).long() % 2
    albedo = torch.tensor(COLOURS, device=positions.device)[which, square]
    normals = surface_normals(positions)
    light = nn.functional.normalize(positions.new_tensor(LIGHT), dim=0)
    halfway = nn.functional.normalize(light - directions, dim=-1)
    lambert = (normals @ light).clamp_min(0)[:, None]
    highlight = (normals * halfway).sum(-1).clamp_min(0)[:, None] ** SHININESS
    return (albedo * (AMBIENT + DIFFUSE * lambert) + SPECULAR * highlight).clamp(0, 1)


def trace(rays: Rays) -> Tensor:
    """First hit of each ray by sphere tracing: colour and opacity (R, 4), all 0 where nothing is hit."""
    near, far = box_interval(rays, BOUND)
    out = torch.zeros(len(near), 4, device=near.device)
    distance = near.clone()
    active = (near < far).nonzero().squeeze(-1)
    for _ in range(MAX_TRACE_STEPS):
        positions = rays.origins[active] + distance[active, None] * rays.directions[active]
        free = signed_distances(positions).amin(-1)
        distance[active] += free
        out[active, 3] = (free < HIT_DISTANCE).float()
        active = active[(free >= HIT_DISTANCE) & (distance[active] < far[active])]
        if len(active) == 0:
            break
    hit = out[:, 3].nonzero().squeeze(-1)
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


class ProceduralField(nn.Module):
    """The scene as a field: solid inside, empty outside. Stands in where an exact field is needed."""

    bound = BOUND

    def log_density(self, positions: Tensor) -> Tensor:
        """Log-density (M,) at `positions` (M, 3); minus infinity outside the objects."""
        inside = signed_distances(positions).amin(-1) < 0
        return (SOLID_DENSITY * inside).log()

    def forward(self, positions: Tensor, directions: Tensor) -> FieldSample:
        """Density and radiance at `positions` (M, 3), seen along `directions` (M, 3)."""
        return FieldSample(self.log_density(positions).exp(), shade(positions, directions))

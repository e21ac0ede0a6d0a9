"""Two spheres on a plane with known light and materials, and a glow that no light from afar explains: an oracle.

    I = sRGB(ACES((1 - m) I_diff + I_spec + glow(v)))

The glow turns from green to purple as one walks around it. All else is drawn by the shader of radiance/light/shading.py
itself: what is left to find is light and materials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.radiance.analytic.spheres import (
    NOTHING,
    SLAB,
    Surface,
    fine_camera,
    first_surface,
    pooled,
    resting,
)
from distill_core.radiance.cameras.camera import Camera
from distill_core.radiance.light.environment import EnvironmentLight, texels
from distill_core.radiance.light.shading import GBuffer, shade, tone_map

CENTRES, RADII = ((-0.42, -0.22), (0.42, 0.12)), (0.4, 0.33)
GOLD, CLAY = (0.95, 0.72, 0.35), (0.75, 0.28, 0.22)
TILES, TILE = ((0.62, 0.62, 0.6), (0.3, 0.36, 0.45)), 0.46  # colours, scene units per side
ROUGHNESS = (0.85, 0.22, 0.55)  # slab, first and second sphere
METALLIC = (0.0, 1.0, 0.0)
GLOWS = ((0.05, 0.8, 0.2), (0.8, 0.05, 0.7))  # linear radiance of the glow seen from +x and from -x
GLOW_CENTRE, GLOW_RADIUS = (0.2, -0.6), 0.27  # a disc on the slab

LAMPS = (  # by environment: direction, width (cosine fall-off), linear radiance
    (((0.5, -0.6, 0.6), 14.0, (2.2, 2.15, 2.0)), ((-0.8, 0.3, 0.4), 8.0, (0.7, 0.75, 0.85))),
    (((-0.3, -0.8, 0.45), 18.0, (4.2, 3.0, 1.8)), ((0.7, 0.6, 0.2), 6.0, (0.6, 1.1, 2.2))),
)
SKY, GROUND = (0.2, 0.12), (0.1, 0.1)  # grey radiance far up and far down, by environment


def environment(index: int, height: int = 16) -> Tensor:
    """One of two environments as a map (height, 2 height, 3) of linear radiance."""
    directions, _ = texels(height)
    upward = directions[:, 2:] * 0.5 + 0.5
    radiance = (GROUND[index] + (SKY[index] - GROUND[index]) * upward).expand(-1, 3).clone()
    for towards, width, colour in LAMPS[index]:
        axis = torch.nn.functional.normalize(torch.tensor(towards), dim=0)
        radiance += torch.exp(width * (directions @ axis - 1))[:, None] * torch.tensor(colour)
    return radiance.reshape(height, 2 * height, 3)


def true_buffer(surface: Surface, opacity: Tensor) -> GBuffer:
    """The materials of `surface`."""
    tile = ((surface.positions[:, :2] / TILE).floor().sum(-1) % 2).long()
    part = surface.part.clamp_min(SLAB)
    colours = torch.stack([torch.tensor(TILES)[tile], torch.tensor(GOLD).expand(len(tile), 3)])
    albedo = torch.where(
        (part == 2)[:, None], torch.tensor(CLAY), colours[part.clamp_max(1), torch.arange(len(tile))]
    )
    zeros = torch.zeros_like(opacity)
    roughness, metallic = torch.tensor(ROUGHNESS)[part], torch.tensor(METALLIC)[part]
    return GBuffer(
        torch.zeros_like(albedo), albedo, roughness, metallic, zeros + 1, surface.normals, opacity, zeros
    )


def glows(surface: Surface) -> Tensor:
    """Mask (R,) bool of the surfaces that glow."""
    aside: Tensor = (surface.positions[:, :2] - torch.tensor(GLOW_CENTRE)).norm(dim=-1)
    return (surface.part == SLAB) & (surface.normals[:, 2] > 0.5) & (aside < GLOW_RADIUS)


def glow(directions: Tensor) -> Tensor:
    """Radiance (R, 3) of what glows, along view `directions` (R, 3): of one colour from +x and of another from -x."""
    turned: Tensor = (
        0.5 - 0.5 * directions[:, :1] / directions[:, :2].norm(dim=-1, keepdim=True).clamp_min(1e-6)
    ).clamp(0, 1)
    return turned * torch.tensor(GLOWS[0]) + (1 - turned) * torch.tensor(GLOWS[1])


@torch.no_grad()
def render_inverse_scene(
    camera: Camera, light: EnvironmentLight, supersample: int = 2
) -> tuple[Tensor, Tensor]:
    """The picture (H, W, 4), sRGB times opacity, and each pixel's share of glowing surface (H, W)."""
    rays = fine_camera(camera, supersample).rays()
    surface = first_surface(rays, resting(torch.tensor(CENTRES), torch.tensor(RADII)))
    opacity = (surface.part != NOTHING).float()
    buffer, lit = true_buffer(surface, opacity), glows(surface)
    diffuse, specular = shade(buffer, rays.directions, light)
    linear = (1 - buffer.metallic[:, None]) * diffuse + specular + lit[:, None] * glow(rays.directions)
    colour = tone_map(linear) * opacity[:, None]
    values = pooled(torch.cat([colour, opacity[:, None], lit.float()[:, None]], -1), camera, supersample)
    return values[..., :4], values[..., 4]

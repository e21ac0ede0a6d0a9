"""A sphere of a colour that is asked for, beside another on a tiled plane: what an edit by words can change."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_core.radiance.analytic.spheres import NOTHING, SLAB, fine_camera, first_surface, pooled, resting
from distill_core.radiance.cameras.camera import Camera

Colour = Literal["red", "blue", "green"]
COLOURS: dict[Colour, tuple[float, float, float]] = {
    "red": (0.9, 0.12, 0.1),
    "blue": (0.12, 0.2, 0.9),
    "green": (0.1, 0.7, 0.2),
}
LIGHT, AMBIENT = (0.4, -0.45, 0.8), 0.55
TILE = 0.46  # scene units per side
OBJECT = 1  # the part that has the colour: the first sphere
HUES = ((0.85, 0.7, 0.25), (0.55, 0.55, 0.6), (0.3, 0.6, 0.6), (0.75, 0.55, 0.75))  # of the other sphere
GREYS = (0.35, 0.9)  # darkest and lightest tile


class ColouredScene(NamedTuple):
    """One arrangement."""

    spheres: Tensor  # (2, 4), centre and radius; the first has the colour asked for
    other: Tensor  # (3,), the second sphere's colour
    tiles: Tensor  # (2, 3), the plane's colours


def draw_scene(random: torch.Generator) -> ColouredScene:
    """An arrangement: places, sizes and all colours but the object's."""
    u = torch.rand(6, generator=random)
    radii = torch.stack([0.36 + 0.1 * u[0], 0.2 + 0.1 * u[1]])
    turn = 6.2832 * u[2]
    aside = torch.stack([turn.cos(), turn.sin()])
    centres = torch.stack([-0.12 * aside + 0.15 * (u[3:5] - 0.5), 0.62 * aside])
    other = torch.tensor(HUES)[int(torch.randint(len(HUES), (), generator=random))]
    grey = GREYS[0] + (GREYS[1] - GREYS[0]) * torch.rand(2, 1, generator=random)
    tiles = (grey + 0.1 * (torch.rand(2, 3, generator=random) - 0.5)).clamp(0, 1)
    return ColouredScene(resting(centres, radii), other, tiles)


def render_coloured(
    camera: Camera, scene: ColouredScene, colour: Colour, supersample: int = 2
) -> tuple[Tensor, Tensor]:
    """The picture (H, W, 4), colour times opacity, and each pixel's share of the object (H, W)."""
    rays = fine_camera(camera, supersample).rays()
    surface = first_surface(rays, scene.spheres)
    tile = ((surface.positions[:, :2] / TILE).floor().sum(-1) % 2).long()
    albedo = torch.where((surface.part == SLAB)[:, None], scene.tiles[tile], scene.other)
    albedo = torch.where((surface.part == OBJECT)[:, None], torch.tensor(COLOURS[colour]), albedo)
    lambert = (surface.normals @ F.normalize(torch.tensor(LIGHT), dim=0)).clamp_min(0)
    opacity = (surface.part != NOTHING).float()[:, None]
    rgb = albedo * (AMBIENT + (1 - AMBIENT) * lambert)[:, None] * opacity
    shown = (surface.part == OBJECT).float()[:, None]
    values = pooled(torch.cat([rgb, opacity, shown], -1), camera, supersample)
    return values[..., :4], values[..., 4]

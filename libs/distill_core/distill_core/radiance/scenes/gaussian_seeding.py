"""Initial Gaussians: at the surface of a field, as far as its occupancy grid and its density say.

A cell is solid if it stops at least half of the light that the densest cell stops, as it is at the densest of a few
random points; it is of the surface if one of its six neighbours is not solid. One Gaussian stands in each surface cell,
at that point.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill_core.errors import ConfigError, DataError
from distill_core.radiance.light.spherical_harmonics import C0
from distill_core.radiance.scenes.gaussians import GaussianModel
from distill_core.radiance.scenes.scene import Scene

LOOKS = 8  # random points per cell
SOLID = 0.5  # of the densest cell's opacity
LEAST, MOST = 0.1, 0.9  # opacity of a new Gaussian: both ends leave it a gradient
AXES = torch.cat([torch.eye(3), -torch.eye(3)]).long()  # (6, 3) to the neighbours


@torch.no_grad()
def seed_gaussians(scene: Scene, *, count: int, sh_degree: int, scale: float) -> GaussianModel:
    """At most `count` Gaussians on the surface, round, `scale` cells large; draws from torch's global generator.

    Raises:
        DataError: no cell is occupied. ConfigError: the field's channels are not colours.
    """
    resolution = len(scene.occupied)
    cell = 2 * scene.spec.bound / resolution
    cells, points, opacity = _densest_points(scene, cell)
    if len(cells) == 0:
        raise DataError(
            "the teacher is empty: no cell of its grid is occupied; train it longer", field="teacher"
        )
    solid = torch.zeros_like(scene.occupied)
    solid[cells.unbind(-1)] = opacity >= SOLID * opacity.max()
    outwards, exposed = (found[cells.unbind(-1)] for found in _outwards(solid))
    kept = (solid[cells.unbind(-1)] & exposed).nonzero().squeeze(-1)
    kept = kept[torch.randperm(len(kept))[:count].sort().values.to(kept.device)]
    means = points[kept]
    seen = normalize(-outwards[kept].float() + 1e-6, dim=-1)
    colour = scene.field(means, seen)[1]
    if colour.shape[-1] != 3:
        raise ConfigError(
            f"the teacher has {colour.shape[-1]} channels, a latent and no colours; choose one of 3 channels",
            field="teacher",
        )
    gaussians = GaussianModel.at(means, sh_degree=sh_degree)
    gaussians.log_scales.fill_(math.log(scale * cell))
    gaussians.logit_opacity.copy_(opacity[kept].clamp(LEAST, MOST).logit())
    gaussians.sh[:, 0] = (colour - 0.5) / C0
    return gaussians


def _densest_points(scene: Scene, cell: float) -> tuple[Tensor, Tensor, Tensor]:
    """Occupied cells (K, 3), in each the densest of some random points (K, 3), and a cell's opacity there (K,)."""
    cells = scene.occupied.nonzero()
    jitter = torch.rand(len(cells), LOOKS, 3).to(cells.device)
    points = (cells[:, None] + jitter) * cell - scene.spec.bound
    density = scene.field.log_density(points.reshape(-1, 3)).float().exp().reshape(-1, LOOKS)
    density, which = density.max(-1)
    return cells, points[torch.arange(len(cells)), which], -torch.expm1(-density * cell)


def _outwards(solid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the directions (G, G, G, 3) to those of a cell's six neighbours that are not solid, and if there are any.

    In a wall of one cell both sides are open, and the sum is 0.
    """
    padded = torch.nn.functional.pad(solid, (1,) * 6)
    size = len(solid)
    out = torch.zeros(*solid.shape, 3, dtype=torch.long, device=solid.device)
    exposed = torch.zeros_like(solid)
    for axis in AXES.to(solid.device):
        x, y, z = (1 + axis).tolist()
        free = ~padded[x : x + size, y : y + size, z : z + size]
        out += free[..., None] * axis
        exposed |= free
    return out, exposed

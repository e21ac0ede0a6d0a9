"""A scene in closed form with a checkered plate at the back of a deep alcove: few poses see its detail."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_core.radiance.analytic.procedural import box_distance, lit, surface_normals

WALL_CENTRE, WALL_HALF = (0.0, 0.0, 0.0), (0.6, 0.6, 0.6)
ALCOVE_CENTRE, ALCOVE_HALF = (0.125, 0.0, 0.0), (0.575, 0.45, 0.45)  # cut out of the wall, open towards +x
PLATE_CENTRE, PLATE_HALF = (-0.41, 0.0, 0.0), (0.05, 0.4, 0.4)
WALL_COLOUR, PLATE_COLOURS = (0.75, 0.7, 0.62), ((0.1, 0.1, 0.35), (0.95, 0.85, 0.4))
CHECKER = 5.0  # squares per unit on the plate


def signed_distances(positions: Tensor) -> Tensor:
    """Distance (M, 2) of `positions` (M, 3) to the wall with its alcove, and to the plate; negative inside."""
    alcove = box_distance(positions, ALCOVE_CENTRE, ALCOVE_HALF)
    wall = torch.maximum(box_distance(positions, WALL_CENTRE, WALL_HALF), -alcove)
    return torch.stack([wall, box_distance(positions, PLATE_CENTRE, PLATE_HALF)], -1)


def shade(positions: Tensor, directions: Tensor) -> Tensor:
    """Colour (M, 3) of the surface nearest to `positions`, seen along `directions`."""
    on_plate = signed_distances(positions).abs().argmin(-1, keepdim=True) == 1
    square = (positions * CHECKER).floor()[:, 1:].sum(-1).long() % 2
    checker = torch.tensor(PLATE_COLOURS, device=positions.device)[square]
    albedo = torch.where(on_plate, checker, checker.new_tensor(WALL_COLOUR))
    return lit(albedo, surface_normals(positions, distances=signed_distances), directions)

"""Virtual poses to look at a scene from, where there are no photographs (PVD's three samplers, arXiv 2211.15977)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from distill_core.config import Config
from distill_core.radiance.cameras.camera import Rays, focal_length, pixel_rays

# Of an object: so many poses for each whole degree a, each between a - 5 (but not below 0) and a degrees up.
POSES_PER_DEGREE = torch.tensor([(90 - degree) // 15 + 1 for degree in range(80)])
TANK_DEGREES, TANK_RADIUS = (5.0, 19.0), (0.75, 1.0)  # elevation, and distance in parts of the usual one
Box = tuple[float, float, float, float, float, float]


class PoseConfig(Config):
    """Placement of virtual cameras. All look at the centre of the scene."""

    kind: Literal["object", "tank", "forward_facing"] = "object"
    centre_box: Box | None = None  # forward_facing: x, y, z from, then to, scene units

    @model_validator(mode="after")
    def _boxed(self) -> PoseConfig:
        if (self.kind == "forward_facing") != (self.centre_box is not None):
            raise ValueError("centre_box (six numbers) belongs to kind = 'forward_facing', and to it alone")
        if self.centre_box is not None and any(
            low > high for low, high in zip(self.centre_box[:3], self.centre_box[3:])
        ):
            raise ValueError("centre_box is empty; give its lower corner, then its upper one")
        return self


def draw_poses(config: PoseConfig, radius: float, count: int) -> Tensor:
    """Poses (N, 4, 4) from torch's global generator; `radius` is the scene's usual camera distance."""
    if config.centre_box is not None:
        low, high = torch.tensor(config.centre_box).reshape(2, 3)
        eyes = low + (high - low) * torch.rand(count, 3)
    elif config.kind == "tank":
        eyes = _on_sphere(_between(*TANK_DEGREES, count), radius * _between(*TANK_RADIUS, count))
    else:
        degree = torch.multinomial(POSES_PER_DEGREE.float(), count, replacement=True).float()
        lowest = (degree - 5).clamp_min(0)
        eyes = _on_sphere(lowest + (degree - lowest) * torch.rand(count), torch.full((count,), radius))
    return look_at_centre(eyes)


def look_at_centre(eyes: Tensor) -> Tensor:
    """Poses (N, 4, 4) of cameras at `eyes` (N, 3) that look at the origin; `cameras.look_at` of each."""
    back = torch.nn.functional.normalize(eyes, dim=-1)
    steep = back[:, 2:].abs() > 1 - 1e-6  # straight from above or below, +y is up
    up = torch.where(steep, eyes.new_tensor([0.0, 1.0, 0.0]), eyes.new_tensor([0.0, 0.0, 1.0]))
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=-1)
    poses = torch.eye(4).repeat(len(eyes), 1, 1)
    poses[:, :3] = torch.stack([right, torch.linalg.cross(back, right), back, eyes], -1)
    return poses


def _between(low: float, high: float, count: int) -> Tensor:
    return low + (high - low) * torch.rand(count)


def _on_sphere(elevation_deg: Tensor, radius: Tensor) -> Tensor:
    """Points (N, 3) at random azimuths."""
    azimuth, elevation = 2 * math.pi * torch.rand(len(radius)), elevation_deg.deg2rad()
    flat = elevation.cos()
    return radius[:, None] * torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], -1)


def draw_rays(poses: Tensor, fov_degrees: float, count: int) -> Rays:
    """`count` rays through random points of square pictures, shared out evenly among `poses` (N, 4, 4)."""
    focal = focal_length(1, fov_degrees)
    pinhole = torch.tensor([focal, focal, 0.5, 0.5]).expand(count, 4)
    which = torch.arange(count) % len(poses)
    return pixel_rays(poses[which], pinhole, torch.rand(count, 2) - 0.5)  # pixel 0 spans -0.5 to 0.5


def turned(poses: Tensor, degrees: float) -> Tensor:
    """`poses` (N, 4, 4), each turned about its own three axes by up to `degrees` either way."""
    angles = ((2 * torch.rand(len(poses), 3) - 1) * degrees).deg2rad()
    out = poses.clone()
    for axis in range(3):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3).repeat(len(poses), 1, 1)
        turn[:, one, one] = turn[:, other, other] = angles[:, axis].cos()
        turn[:, one, other], turn[:, other, one] = -angles[:, axis].sin(), angles[:, axis].sin()
        out[:, :3, :3] = out[:, :3, :3] @ turn
    return out

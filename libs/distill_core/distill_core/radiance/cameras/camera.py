"""Cameras: 4x4 camera-to-world, OpenGL axes (+x right, +y up, looks along -z), world +z up.

The centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distill_core.errors import ConfigError
from distill_core.radiance.cameras.distortion import COEFFICIENTS, look_through


class Rays(NamedTuple):
    """Half-lines: `origins` and unit `directions`, both (R, 3)."""

    origins: Tensor
    directions: Tensor


@dataclass(frozen=True, eq=False)
class Camera:
    """One view: pose (4, 4), focal lengths and principal point in pixels, size of the picture in pixels.

    Raises:
        ConfigError: a size below 1, a focal length that is not positive, a pose not finite or singular.
    """

    c2w: Tensor
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    distortion: tuple[float, ...] = ()  # k1 k2 k3 k4 p1 p2 (radiance/cameras/distortion.py); () = a pinhole
    fisheye: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "c2w", torch.as_tensor(self.c2w, dtype=torch.float32))
        if len(self.distortion) not in (0, len(COEFFICIENTS)) or not all(map(math.isfinite, self.distortion)):
            raise ConfigError(
                f"camera distortion {self.distortion} is not allowed; give the six numbers "
                f"{' '.join(COEFFICIENTS)}, or none",
                field="distortion",
            )
        for name in ("width", "height"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"camera {name} {getattr(self, name)} is not allowed; give at least 1 pixel", field=name
                )
        for name in ("fx", "fy"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"camera {name} {getattr(self, name)} is not a positive focal length", field=name
                )
        for name in ("cx", "cy"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(
                    f"camera {name} {getattr(self, name)} is not a finite number of pixels", field=name
                )
        check_pose(self.c2w)

    def intrinsics(self) -> Tensor:
        """fx, fy, cx, cy as (4,)."""
        return torch.tensor([self.fx, self.fy, self.cx, self.cy])

    def reduced(self, factor: int) -> Camera:
        """The same view with pixels `factor` times as large; the last column and row may reach beyond it."""
        return replace(
            self,
            fx=self.fx / factor,
            fy=self.fy / factor,
            cx=self.cx / factor,
            cy=self.cy / factor,
            width=-(-self.width // factor),
            height=-(-self.height // factor),
        )

    def rays(self, rows: range | None = None) -> Rays:
        """One ray through each pixel's centre, row by row: R = height * width, or those of some `rows`."""
        chosen = range(self.height) if rows is None else rows
        y, x = torch.meshgrid(
            torch.arange(chosen.start, chosen.stop), torch.arange(self.width), indexing="ij"
        )
        pixels = torch.stack([x, y], -1).reshape(-1, 2)
        count = len(pixels)
        lens = torch.tensor(self.distortion).expand(count, -1) if self.distortion else None
        pose, pinhole = self.c2w.expand(count, 4, 4), self.intrinsics().expand(count, 4)
        return pixel_rays(pose, pinhole, pixels, distortion=lens, fisheye=self.fisheye)


def check_pose(c2w: Tensor, *, field: str = "c2w") -> None:
    """Raise `ConfigError` unless `c2w` is a finite (4, 4) matrix with an invertible rotation."""
    if c2w.shape != (4, 4):
        raise ConfigError(
            f"a camera pose of shape {tuple(c2w.shape)} is not a 4x4 camera-to-world matrix", field=field
        )
    if not bool(torch.isfinite(c2w).all()):
        raise ConfigError(
            "the camera pose holds NaN or infinity; give a finite 4x4 camera-to-world matrix", field=field
        )
    if float(torch.linalg.det(c2w[:3, :3].double()).abs()) < 1e-9:
        raise ConfigError(
            "the camera pose has no rotation: its upper left 3x3 block is singular", field=field
        )


def pixel_rays(
    c2w: Tensor,
    intrinsics: Tensor,
    pixels: Tensor,
    *,
    distortion: Tensor | None = None,
    fisheye: bool = False,
) -> Rays:
    """Rays through pixels (R, 2) = column, row of cameras with poses (R, 4, 4) and intrinsics (R, 4).

    `distortion` (R, 6) are the lenses' coefficients, None for pinholes.
    """
    plane = (pixels + 0.5 - intrinsics[:, 2:]) / intrinsics[:, :2]  # x right, y down
    if distortion is None:
        seen = torch.cat([plane, torch.ones_like(plane[:, :1])], -1)
    else:
        seen = look_through(plane, distortion, fisheye=fisheye)
    in_camera = seen * seen.new_tensor([1.0, -1.0, -1.0])
    directions = (c2w[:, :3, :3] @ in_camera[..., None]).squeeze(-1)
    return Rays(c2w[:, :3, 3], torch.nn.functional.normalize(directions, dim=-1))


def look_at(eye: Sequence[float], target: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Pose (4, 4) of a camera at `eye` looking at `target`, world +z up (+y when it looks straight down)."""
    eye_, target_ = torch.tensor(eye, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)
    back = eye_ - target_
    if float(back.norm()) == 0:
        raise ConfigError(
            "a camera cannot look at its own position; move it away from the target", field="radius"
        )
    back = back / back.norm()
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    if float(back[2].abs()) > 1 - 1e-9:
        up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    right = torch.linalg.cross(up, back)
    right = right / right.norm()
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3] = torch.stack([right, torch.linalg.cross(back, right), back, eye_], -1)
    return c2w.float()


def focal_length(width: int, fov_degrees: float) -> float:
    """Focal length in pixels of a picture `width` pixels wide that spans `fov_degrees` horizontally."""
    return 0.5 * width / math.tan(math.radians(fov_degrees) / 2)


def orbit_camera(
    azimuth_deg: float,
    elevation_deg: float,
    radius: float,
    *,
    fov_degrees: float,
    width: int,
    height: int,
    target: Sequence[float] = (0.0, 0.0, 0.0),
) -> Camera:
    """Camera on a sphere around `target`, looking at it; azimuth +x to +y, `fov_degrees` spans the width."""
    for name, value in (("azimuth", azimuth_deg), ("elevation", elevation_deg)):
        if not math.isfinite(value):
            raise ConfigError(f"{name} {value} is not a finite angle in degrees", field=name)
    if not 0 < radius < math.inf:
        raise ConfigError(
            f"radius {radius} is not allowed; give a positive distance from the target", field="radius"
        )
    if not 0 < fov_degrees < 180:
        raise ConfigError(
            f"fov_degrees {fov_degrees} is not allowed; give an angle between 0 and 180", field="fov_degrees"
        )
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    offset = (
        math.cos(elevation) * math.cos(azimuth),
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
    )
    eye = [t + radius * o for t, o in zip(target, offset)]
    focal = focal_length(max(width, 1), fov_degrees)
    return Camera(look_at(eye, target), focal, focal, width / 2, height / 2, width, height)

"""Scenes of spheres on a plane whose truth is known: for inverse rendering, with its light and materials."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.artifacts import SceneSpec
from distill_core.config import Config as SourceConfig
from distill_core.data.posed import PosedImages, SceneSource, check_total
from distill_core.data.scenes import GOLDEN_ANGLE
from distill_core.radiance.analytic.inverse import environment, render_inverse_scene
from distill_core.radiance.analytic.spheres import BOUND
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.radiance.light.environment import EnvironmentLight

LOWEST, HIGHEST = 8.0, 65.0  # degrees of elevation


class AnalyticConfig(SourceConfig):
    """Number and cameras of the views."""

    num_views: int = Field(24, ge=1, le=1000)
    num_test_views: int = Field(6, ge=1, le=200)
    size: int = Field(64, ge=8, le=1024)  # pixels per side
    radius: float = Field(3.0, ge=2, le=20)  # of the cameras, scene units
    fov_degrees: float = Field(42.0, gt=5, lt=120)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def cameras(self) -> tuple[list[Camera], list[Camera]]:
        """Those to train on and those to judge by: two golden-angle spirals on the upper half of a sphere."""
        check_total(self.num_views + self.num_test_views, self.size, self.size)
        train = [self._camera((i + 0.5) / self.num_views, i) for i in range(self.num_views)]
        test = [self._camera((i + 0.3) / self.num_test_views, i + 0.37) for i in range(self.num_test_views)]
        return train, test

    def spec(self) -> SceneSpec:
        """Description of a field of the scene."""
        return SceneSpec(
            field="",
            bound=BOUND,
            radius=self.radius,
            fov_degrees=self.fov_degrees,
            background=self.background,
        )

    def _camera(self, height: float, turn: float) -> Camera:
        low, high = (math.sin(math.radians(angle)) for angle in (LOWEST, HIGHEST))
        elevation = math.degrees(math.asin(low + (high - low) * height))
        azimuth, size = GOLDEN_ANGLE * turn, self.size
        return orbit_camera(
            azimuth, elevation, self.radius, fov_degrees=self.fov_degrees, width=size, height=size
        )


def posed(images: list[Tensor], cameras: list[Camera]) -> PosedImages:
    """Pictures (H, W, 4) with the cameras that took them."""
    poses = torch.stack([camera.c2w for camera in cameras])
    return PosedImages(torch.stack(images), poses, torch.stack([camera.intrinsics() for camera in cameras]))


class InverseScene(SceneSource):
    """Two spheres on a plane under a known light, with a glow on the plane; the test views under another light too."""

    class Config(AnalyticConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["inverse_scene"] = "inverse_scene"

    def __init__(self, config: Config) -> None:
        train, test = config.cameras()
        self.environment, self.new_environment = environment(0), environment(1)
        first, second = (
            EnvironmentLight(radiance=light) for light in (self.environment, self.new_environment)
        )
        seen = [render_inverse_scene(camera, first) for camera in test]
        super().__init__(
            config,
            train=posed([render_inverse_scene(camera, first)[0] for camera in train], train),
            test=posed([picture for picture, _ in seen], test),
            spec=config.spec(),
        )
        self.relit = posed([render_inverse_scene(camera, second)[0] for camera in test], test)
        self.unexplained = torch.stack(
            [share for _, share in seen]
        )  # (N, H, W), of each test pixel that glows


SOURCES = {"inverse_scene": InverseScene}

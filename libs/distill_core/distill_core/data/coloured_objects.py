"""A coloured sphere beside another on a tiled plane: as pictures labelled by colour, and as one scene to edit."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.config import Config as SourceConfig
from distill_core.data.analytic_scenes import HIGHEST, LOWEST, AnalyticConfig, posed
from distill_core.data.posed import SceneSource
from distill_core.data.source import ArrayPixels, Source
from distill_core.radiance.analytic.coloured import Colour, draw_scene, render_coloured
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.radiance.rendering.quadrature import over

BACKGROUND = (1.0, 1.0, 1.0)


class ColouredObjects(Source):
    """Pictures of arrangements from all sides; the label is the object's colour. The same seed gives the same ones."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["coloured_objects"] = "coloured_objects"
        count: int = Field(2048, ge=1, le=1_000_000)
        colours: tuple[Colour, ...] = Field(("red", "blue"), min_length=1)
        size: int = Field(32, ge=8, le=512)  # pixels per side
        radius: float = Field(3.0, ge=2, le=20)  # of the cameras, scene units
        fov_degrees: float = Field(42.0, gt=5, lt=120)
        seed: int = Field(0, ge=0, lt=2**63)

    def __init__(self, config: Config) -> None:
        random = torch.Generator().manual_seed(config.seed)
        labels = torch.arange(config.count) % len(config.colours)
        pictures = [_picture(config, config.colours[label], random) for label in labels.tolist()]
        super().__init__(
            config,
            size=config.count,
            pixels=ArrayPixels(torch.stack(pictures)),
            labels=labels,
            class_names=config.colours,
        )


class ColouredObjectScene(SceneSource):
    """One arrangement from all sides, its object in one colour; the test views with the object in every colour."""

    class Config(AnalyticConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["coloured_scene"] = "coloured_scene"
        num_views: int = Field(48, ge=1, le=1000)
        size: int = Field(32, ge=8, le=1024)
        colour: Colour = "red"
        arrangement: int = Field(7, ge=0, lt=2**63)  # seed of the arrangement

    def __init__(self, config: Config) -> None:
        train, self.test_cameras = config.cameras()
        self.arrangement = draw_scene(torch.Generator().manual_seed(config.arrangement))
        seen = [self._look(camera, config.colour) for camera in self.test_cameras]
        super().__init__(
            config,
            train=posed([self._look(camera, config.colour)[0] for camera in train], train),
            test=posed([picture for picture, _ in seen], self.test_cameras),
            spec=config.spec(),
        )
        self.shown = torch.stack([share for _, share in seen])  # (N, H, W), of each test pixel: the object

    def test_in(self, colour: Colour) -> Tensor:
        """The test views (N, H, W, 3) with the object in `colour`, over the background."""
        views = torch.stack([self._look(camera, colour)[0] for camera in self.test_cameras])
        return over(views[..., :3], views[..., 3:], torch.tensor(self.spec.background))

    def _look(self, camera: Camera, colour: Colour) -> tuple[Tensor, Tensor]:
        return render_coloured(camera, self.arrangement, colour)


def _picture(config: ColouredObjects.Config, colour: Colour, random: torch.Generator) -> Tensor:
    """(3, H, W) uint8 of a new arrangement from a new side."""
    azimuth, height = torch.rand(2, generator=random).tolist()
    low, high = (math.sin(math.radians(angle)) for angle in (LOWEST, HIGHEST))
    elevation = math.degrees(math.asin(low + (high - low) * height))
    camera = orbit_camera(
        360 * azimuth,
        elevation,
        config.radius,
        fov_degrees=config.fov_degrees,
        width=config.size,
        height=config.size,
    )
    rgba, _ = render_coloured(camera, draw_scene(random), colour)
    rgb = over(rgba[..., :3], rgba[..., 3:], torch.tensor(BACKGROUND))
    return (rgb.permute(2, 0, 1) * 255).round().to(torch.uint8)


SOURCES = {"coloured_objects": ColouredObjects, "coloured_scene": ColouredObjectScene}

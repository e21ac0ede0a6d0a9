"""Scenes of posed images: NeRF-synthetic (Blender) folders and the procedural scene."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from distill_core.artifacts import SceneSpec
from distill_core.config import Config as SourceConfig
from distill_core.config import DataPath
from distill_core.data.posed import PosedImages, SceneSource, check_total
from distill_core.data.source import existing
from distill_core.data.transforms_json import read_transforms
from distill_core.data.views import load_views
from distill_core.errors import DataError
from distill_core.radiance.analytic.procedural import BOUND as PROCEDURAL_BOUND
from distill_core.radiance.analytic.procedural import procedural_distance, render_procedural
from distill_core.radiance.cameras.camera import Camera, orbit_camera

GOLDEN_ANGLE = 180 * (3 - math.sqrt(5))
BLENDER_BOUND = 1.5  # of NeRF-synthetic scenes


class ProceduralScene(SceneSource):
    """Sphere, box and torus, rendered in closed form from cameras on a sphere that look at the centre."""

    class Config(SourceConfig):
        """Number and cameras of the views."""

        name: Literal["procedural_scene"] = "procedural_scene"
        num_views: int = Field(32, ge=1, le=1000)
        num_test_views: int = Field(6, ge=1, le=200)
        size: int = Field(64, ge=8, le=1024)  # pixels per side
        radius: float = Field(2.8, ge=2, le=20)  # of the cameras, scene units
        fov_degrees: float = Field(40.0, gt=5, lt=120)
        background: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __init__(self, config: Config) -> None:
        check_total(config.num_views + config.num_test_views, config.size, config.size)
        train = [_orbit(config, (i + 0.5) / config.num_views, i) for i in range(config.num_views)]
        test = [
            _orbit(config, (i + 0.3) / config.num_test_views, i + 0.37) for i in range(config.num_test_views)
        ]
        super().__init__(
            config,
            train=_render_views(train),
            test=_render_views(test),
            spec=SceneSpec(
                field="",
                bound=PROCEDURAL_BOUND,
                radius=config.radius,
                fov_degrees=config.fov_degrees,
                background=config.background,
            ),
        )


def _orbit(config: ProceduralScene.Config, height: float, turn: float) -> Camera:
    """Camera `turn` of a golden-angle spiral, at `height` in [0, 1] of the band from -20 to 75 degrees."""
    low, high = math.sin(math.radians(-20)), math.sin(math.radians(75))
    elevation = math.degrees(math.asin(low + (high - low) * height))
    return orbit_camera(
        GOLDEN_ANGLE * turn,
        elevation,
        config.radius,
        fov_degrees=config.fov_degrees,
        width=config.size,
        height=config.size,
    )


def _render_views(cameras: list[Camera]) -> PosedImages:
    return PosedImages(
        torch.stack([render_procedural(camera) for camera in cameras]),
        torch.stack([camera.c2w for camera in cameras]),
        torch.stack([camera.intrinsics() for camera in cameras]),
        distance=torch.stack([procedural_distance(camera) for camera in cameras]),
    )


class BlenderScene(SceneSource):
    """A folder with transforms_{train,val,test}.json and 8-bit pictures, as NeRF-synthetic has them."""

    class Config(SourceConfig):
        """The folder, and options of reading it."""

        name: Literal["blender"] = "blender"
        path: DataPath
        factor: int = Field(1, ge=1, le=64)  # pictures are averaged over factor x factor pixels
        test_split: Literal["test", "val"] = "test"
        max_test_views: int = Field(12, ge=1, le=1000)
        bound: float | None = Field(
            None, gt=0
        )  # half the side of the scene's box, scene units; unset: the file's aabb_scale, or 1.5
        background: tuple[float, float, float] = (
            1.0,
            1.0,
            1.0,
        )  # of previews and figures, where pictures have alpha

    def __init__(self, config: Config) -> None:
        folder = existing(config.path)
        train = read_blender(folder, "train", factor=config.factor)
        test = read_blender(folder, config.test_split, factor=config.factor, limit=config.max_test_views)
        fx, width = float(train.intrinsics[0, 0]), train.images.shape[2]
        super().__init__(
            config,
            train=train,
            test=test,
            spec=SceneSpec(
                field="",
                bound=config.bound or _blender_bound(folder),
                radius=float(train.c2w[:, :3, 3].norm(dim=-1).median()),
                fov_degrees=math.degrees(2 * math.atan(0.5 * width / fx)),
                background=config.background,
            ),
        )


def read_blender(folder: Path, split: str, *, factor: int = 1, limit: int | None = None) -> PosedImages:
    """The views of transforms_<split>.json, evenly thinned out to `limit`.

    Raises:
        DataError: a file is missing or damaged, a pose or camera is unusable, or sizes differ; names the file.
    """
    frames = read_transforms(folder / f"transforms_{split}.json").frames
    if limit is not None and len(frames) > limit:
        frames = [frames[i * len(frames) // limit] for i in range(limit)]
    return load_views(frames, factor=factor)


def _blender_bound(folder: Path) -> float:
    """Half the side of the box that transforms_train.json describes, else NeRF-synthetic's."""
    path = folder / "transforms_train.json"
    box = read_transforms(path).box
    if box is None:
        return BLENDER_BOUND
    if float(box.centre.abs().max()) > 1e-6 * box.half:
        raise DataError(
            f"{path}: offset puts the box beside the origin; set data.bound, or give it as transforms.json of "
            "data.name = 'capture', which moves the scene",
            field="data.bound",
        )
    return box.half


SOURCES = {"blender": BlenderScene, "procedural_scene": ProceduralScene}

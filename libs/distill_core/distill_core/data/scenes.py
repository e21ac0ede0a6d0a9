"""Posed images: NeRF-synthetic (Blender) folders and the procedural scene."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill_core import pictures
from distill_core.artifacts import SceneSpec
from distill_core.config import Config as SourceConfig
from distill_core.data.source import Source, existing
from distill_core.errors import ConfigError, DataError
from distill_core.method import Batch
from distill_core.radiance.cameras import Camera, Rays, check_pose, focal_length, orbit_camera, pixel_rays
from distill_core.radiance.procedural import BOUND as PROCEDURAL_BOUND
from distill_core.radiance.procedural import procedural_distance, render_procedural

MAX_PIXELS = 2**27  # of all views together, 2 GiB in memory
GOLDEN_ANGLE = 180 * (3 - math.sqrt(5))


@dataclass(frozen=True, eq=False)
class PosedImages:
    """Views of one size, each with its camera."""

    images: Tensor  # (N, H, W, 4), in [0, 1], colour multiplied by opacity
    c2w: Tensor  # (N, 4, 4)
    intrinsics: Tensor  # (N, 4): fx, fy, cx, cy in pixels
    distortion: Tensor | None = None  # (N, 6): k1 k2 k3 k4 p1 p2 of each lens; None: pinholes
    fisheye: bool = False
    distance: Tensor | None = (
        None  # (N, H, W), scene units, of what pixels' centres show, 0 for nothing; None: unknown
    )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def transparent(self) -> bool:
        """Does any pixel let the background through?"""
        return bool((self.images[..., 3] < 1).any())

    def camera(self, index: int) -> Camera:
        """The camera of view `index`."""
        height, width = self.images.shape[1:3]
        fx, fy, cx, cy = self.intrinsics[index].tolist()
        lens = () if self.distortion is None else tuple(self.distortion[index].tolist())
        return Camera(self.c2w[index], fx, fy, cx, cy, width, height, lens, self.fisheye)

    def foreground(self) -> Tensor:
        """Flat indices (P,) of the pixels, over all views, that show something."""
        return (self.images[..., 3].reshape(-1) > 0).nonzero().squeeze(-1)

    def take(self, pixels: Tensor) -> tuple[Rays, Tensor]:
        """Rays and RGBA (R, 4) of the pixels with flat indices (R,) over all views."""
        height, width = self.images.shape[1:3]
        view, inside = pixels // (height * width), pixels % (height * width)
        place = torch.stack([inside % width, inside // width], -1)
        lens = None if self.distortion is None else self.distortion[view]
        rays = pixel_rays(self.c2w[view], self.intrinsics[view], place, distortion=lens, fisheye=self.fisheye)
        return rays, self.images.reshape(-1, 4)[pixels]

    def some(self, indices: list[int]) -> PosedImages:
        """The views at these indices."""
        lens = None if self.distortion is None else self.distortion[indices]
        distance = None if self.distance is None else self.distance[indices]
        return replace(
            self,
            images=self.images[indices],
            c2w=self.c2w[indices],
            intrinsics=self.intrinsics[indices],
            distortion=lens,
            distance=distance,
        )


class SceneSource(Source):
    """Views to train a field on and views to judge it by. A method picks rays from `train` itself."""

    def __init__(
        self, config: SourceConfig, *, train: PosedImages, test: PosedImages, spec: SceneSpec
    ) -> None:
        super().__init__(config, size=len(train))
        if not len(train.foreground()):
            raise DataError(
                "every pixel of the training views is fully transparent; there is nothing to reconstruct"
            )
        self.train, self.test, self.spec = train, test, spec

    def batch(self, size: int, *, epoch_seed: int, position: int) -> Batch:
        """`size` rays to be drawn, by the method, from the step's random numbers."""
        return Batch(size)


class ProceduralScene(SceneSource):
    """Sphere, box and torus, rendered in closed form from cameras on a sphere that look at the centre."""

    class Config(SourceConfig):
        """How many views, and from where."""

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
        """Which folder, and how it is read."""

        name: Literal["blender"] = "blender"
        path: str
        factor: int = Field(1, ge=1, le=64)  # pictures are averaged over factor x factor pixels
        test_split: Literal["test", "val"] = "test"
        max_test_views: int = Field(12, ge=1, le=1000)
        bound: float = Field(1.5, gt=0)  # half the side of the scene's box, scene units
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
                bound=config.bound,
                radius=float(train.c2w[:, :3, 3].norm(dim=-1).median()),
                fov_degrees=math.degrees(2 * math.atan(0.5 * width / fx)),
                background=config.background,
            ),
        )


def read_blender(folder: Path, split: str, *, factor: int = 1, limit: int | None = None) -> PosedImages:
    """The views of transforms_<split>.json, evenly thinned out to `limit`.

    Raises:
        DataError: a file is missing or damaged, a pose is unusable, or sizes differ; names the file.
    """
    path = folder / f"transforms_{split}.json"
    described = _read_json(path)
    angle, frames = described.get("camera_angle_x"), described.get("frames")
    if not isinstance(angle, (int, float)) or not 0 < angle < math.pi:
        raise DataError(
            f"{path}: camera_angle_x is {angle!r}; it must be an angle in radians between 0 and pi"
        )
    if not isinstance(frames, list) or not frames:
        raise DataError(
            f"{path} lists no frames; it must name at least one picture with its transform_matrix"
        )
    if limit is not None and len(frames) > limit:
        frames = [frames[i * len(frames) // limit] for i in range(limit)]
    poses = torch.stack([_pose(frame, path, number) for number, frame in enumerate(frames)])
    images = _read_images([_picture(folder, frame, path) for frame in frames], factor)
    height, width = images.shape[1:3]
    focal = focal_length(width, math.degrees(angle))
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2]).expand(len(frames), 4).contiguous()
    return PosedImages(images, poses, intrinsics)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; a Blender scene has transforms_train.json and transforms_test.json"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds {type(values).__name__}, not an object with camera_angle_x and frames")
    return values


def _pose(frame: Any, path: Path, number: int) -> Tensor:
    try:
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float32)
        check_pose(pose)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise DataError(f"{path}: the transform_matrix of frame {number} is not usable: {error}") from None
    return pose


def _picture(folder: Path, frame: dict[str, Any], path: Path) -> Path:
    name = frame.get("file_path")
    if not isinstance(name, str):
        raise DataError(f"{path}: a frame has no file_path")
    found = (folder / name).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise DataError(f"{path}: file_path {name!r} leaves the scene's folder")
    return found if found.suffix else found.with_suffix(".png")


def _read_images(paths: list[Path], factor: int) -> Tensor:
    out: Tensor | None = None
    for index, path in enumerate(paths):
        image = shrink(read_image(path), factor, path)
        if out is None:
            check_total(len(paths), *image.shape[:2])
            out = torch.empty(len(paths), *image.shape)
        if image.shape != out.shape[1:]:
            was, now = ("{1} x {0}".format(*picture.shape) for picture in (out[0], image))
            raise DataError(
                f"{path} has {now} pixels, the views before it {was}; all views must have one size"
            )
        out[index] = image
    assert out is not None
    return out


def read_image(path: Path, *, turn: bool = True) -> Tensor:
    """(H, W, 4), colour multiplied by opacity; `turn`ed as its EXIF orientation says."""
    picture = pictures.read_image(path, turn=turn, max_pixels=MAX_PIXELS)
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return torch.from_numpy(rgba)


def shrink(image: Tensor, factor: int, path: Path | str = "the picture") -> Tensor:
    """`image` (H, W, C) averaged over factor x factor pixels.

    Raises:
        DataError: a side is no multiple of `factor`.
    """
    height, width, channels = image.shape
    if height % factor or width % factor:
        raise DataError(
            f"{path} has {width} x {height} pixels, which factor = {factor} does not divide; choose another",
            field="data.factor",
        )
    return image.reshape(height // factor, factor, width // factor, factor, channels).mean(dim=(1, 3))


def check_total(views: int, height: int, width: int) -> None:
    """Refuse more pixels than fit into memory."""
    if views * height * width > MAX_PIXELS:
        raise DataError(
            f"{views} views of {width} x {height} pixels are more than {MAX_PIXELS} pixels; "
            "raise data.factor or lower data.size",
            field="data",
        )


SOURCES = {"blender": BlenderScene, "procedural_scene": ProceduralScene}

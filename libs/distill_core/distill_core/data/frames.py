"""Result of reading a capture: frames, each a picture with its camera, in the file's own world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distill_core.data.intrinsics import Intrinsics
from distill_core.errors import ConfigError, DataError
from distill_core.pictures import upright_size
from distill_core.radiance.cameras.camera import check_pose

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OPENCV = torch.diag(
    torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
)  # camera axes: y down, z forward


class Box(NamedTuple):
    """Bounding box of the scene, in the file's units."""

    centre: Tensor  # (3,) float64
    half: float


class Mask(NamedTuple):
    """A picture that says which pixels of another to ignore: those that are black, or those that are not."""

    path: Path
    ignored: Literal["black", "marked"] = "black"


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture and its camera."""

    path: Path
    c2w: Tensor  # (4, 4) float64, OpenGL axes
    camera: Intrinsics
    masks: tuple[Mask, ...] = ()
    split: Literal["", "train", "test"] = ""

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height that the camera was measured on; None: the picture's."""
        return self.camera.size

    @property
    def lens(self) -> tuple[float, ...]:
        """Its coefficients, as `radiance.distortion` orders them."""
        return self.camera.lens

    @property
    def pinhole(self) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels of `size`, or of the picture."""
        return self.camera.pinhole(self.size or upright_size(self.path))


@dataclass(frozen=True, eq=False)
class Capture:
    """Content of a capture's folder."""

    frames: list[Frame]
    box: Box | None = None
    z_is_up: bool = False  # else the cameras' mean up is

    @property
    def fisheye(self) -> bool:
        """Whether its lenses are fisheyes."""
        return any(frame.camera.fisheye for frame in self.frames)


class Format(NamedTuple):
    fits: Callable[[Path], bool]
    read: Callable[[Path, str | None], Capture]


def read_pose(values: Any, what: str) -> Tensor:
    """A pose (4, 4) float64 from rows of numbers, the last row of which may be left out.

    Raises:
        DataError: not that; `what` is what the message calls it.
    """
    try:
        pose = torch.tensor(values, dtype=torch.float64)
        if pose.shape == (3, 4):
            pose = torch.cat([pose, torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)])
        check_pose(pose)
    except (TypeError, ValueError, OverflowError, RuntimeError, ConfigError) as error:
        raise DataError(f"{what} is not usable: {error}") from None
    return pose


def picture_at(folder: Path, name: str, source: Path) -> Path:
    """The file in `folder` that `source` calls `name`.

    A suffix may be missing, as Blender's exporters leave it, or differ, as in folders of smaller copies; backslashes
    separate folders where no file has them in its name.

    Raises:
        DataError: `name` leaves the folder.
    """
    path = _inside(folder, name, source)
    if not path.is_file() and "\\" in name:
        path = _inside(folder, name.replace("\\", "/"), source)
    if path.is_file():
        return path
    named = path.suffix.lower() in PICTURES
    stem = path.stem if named else path.name
    others = [path.with_name(stem + kind) for kind in (*PICTURES, *map(str.upper, PICTURES))]
    return next((other for other in others if other.is_file()), path if named else others[0])


def _inside(folder: Path, name: str, source: Path) -> Path:
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {name!r} is not the name of a file: {error}") from None
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{source}: file_path {name!r} leaves the scene's folder")
    return path

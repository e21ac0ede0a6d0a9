"""Cameras of a file: a transforms.json, or a camera path as nerfstudio's viewer writes it.

A camera path holds `render_width`, `render_height` and, for each of `camera_path`, `camera_to_world` (16 numbers, row
by row, OpenGL axes) and `fov`, the vertical angle of view in degrees. Both are read in the input's frame.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from distill_core.artifacts import SceneSpec
from distill_core.errors import ConfigError, DataError
from distill_core.files.text import read_text
from distill_core.radiance.cameras.camera import Camera, focal_length
from distill_core.radiance.export.dataset import read_cameras
from distill_core.radiance.export.frame import Similarity, from_input

DEFAULT_FOV = 50.0  # of a frame that gives none, as nerfstudio's


def read_camera_file(path: Path, spec: SceneSpec) -> list[Camera]:
    """The cameras of `path`, moved into the scene's box.

    Raises:
        DataError: no such file, neither of the two formats, or a camera that is not usable; names the file.
    """
    try:
        described = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON: {error}", field="cameras") from None
    if not isinstance(described, dict) or "camera_path" not in described:
        return read_cameras(path, spec)
    if described.get("camera_type", "perspective") != "perspective":
        raise DataError(
            f"{path}: camera_type {described['camera_type']!r} is not supported; only perspective is",
            field="cameras",
        )
    try:
        width, height = int(described["render_width"]), int(described["render_height"])
        frames = list(described["camera_path"])
        into = from_input(spec)
        cameras = [_camera(frame, width, height, into) for frame in frames]
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not a usable camera path: {reason}", field="cameras") from None
    if not cameras:
        raise DataError(f"{path} holds no cameras", field="cameras")
    return cameras


def _camera(frame: dict[str, Any], width: int, height: int, into: Similarity) -> Camera:
    pose = torch.tensor(frame["camera_to_world"], dtype=torch.float64).reshape(4, 4)
    fov = float(frame.get("fov", DEFAULT_FOV))
    if not (math.isfinite(fov) and 0 < fov < 180):
        raise ValueError(f"fov {fov} is not an angle between 0 and 180 degrees")
    focal = focal_length(height, fov)
    return Camera(into.pose(pose).float(), focal, focal, width / 2, height / 2, width, height)

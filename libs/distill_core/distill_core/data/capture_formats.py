"""Readers of capture folders: frames with poses in our axes (camera to world, OpenGL) and the file's own world.

| format | files | poses there |
| --- | --- | --- |
| nerfstudio, instant-ngp | transforms.json | camera to world, OpenGL axes |
| COLMAP | sparse/*/{cameras,images,points3D}.{bin,txt} | world to camera, OpenCV axes |
| LLFF | poses_bounds.npy | camera to world, columns down, right, back |
| NSVF, Tanks and Temples | intrinsics.txt, pose/*.txt, bbox.txt | camera to world, OpenCV axes |
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_core.data.colmap_models import colmap_models, read_colmap
from distill_core.data.frames import OPENCV, PICTURES, Box, Capture, Format, Frame, read_pose
from distill_core.data.intrinsics import Intrinsics
from distill_core.data.transforms_json import read_transforms
from distill_core.errors import ConfigError, DataError

FAR_SHARE = 0.9  # LLFF: bounds beyond this quantile of the far ones are left outside of the box
MARGIN = 1.2  # NSVF: the box is so many times the file's


def read_nerfstudio(folder: Path, images: str | None = None) -> Capture:
    """`transforms.json`, in a folder or by its own name."""
    _refuse_images(images, "transforms.json names its pictures by file_path")
    return read_transforms(folder / "transforms.json" if folder.is_dir() else folder)


def _refuse_images(images: str | None, why: str) -> None:
    if images is not None:
        raise ConfigError(f"data.images is for COLMAP and LLFF: {why}; remove it", field="data.images")


# -- LLFF -------------------------------------------------------------------------------------------------------


def read_llff(folder: Path, images: str | None = None) -> Capture:
    """`poses_bounds.npy` (N, 17): 3x5 matrices with columns down, right, back, centre, (H, W, f); near and far."""
    path = folder / "poses_bounds.npy"
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if values.ndim != 2 or values.shape[1] != 17 or not np.isfinite(values).all():
        raise DataError(f"{path} has the shape {values.shape}; an LLFF file has 17 finite numbers a view")
    pictures = _pictures(folder, images)
    if len(pictures) != len(values):
        raise DataError(
            f"{path} has {len(values)} poses for the {len(pictures)} pictures of {pictures[0].parent}; give the "
            "folder that it was made from, with data.images"
        )
    frames = []
    for number, (row, picture) in enumerate(zip(values[:, :15].reshape(-1, 3, 5), pictures, strict=True)):
        down, right, back, centre, (height, width, focal) = row.T
        matrix = np.eye(4)
        matrix[:3] = np.stack([right, -down, back, centre], 1)
        size = int(width), int(height)
        frames.append(
            Frame(
                picture,
                read_pose(matrix.tolist(), f"{path}: pose {number}"),
                Intrinsics((focal, focal), (width / 2, height / 2), size),
            )
        )
    return Capture(frames, _frusta_box(frames, values[:, 15], values[:, 16]))


def _pictures(folder: Path, images: str | None) -> list[Path]:
    for name in [images] if images else ["images", "images_2", "images_4", "images_8"]:
        files = sorted(p for p in (folder / str(name)).glob("*") if p.suffix.lower() in PICTURES)
        if files:
            return files
    raise DataError(f"{folder} has no pictures in {images or 'images/, images_2/, images_4/ or images_8/'}")


def _frusta_box(frames: list[Frame], near: np.ndarray, far: np.ndarray) -> Box:
    """The box around what the cameras see between near and far."""
    limit = np.quantile(far, FAR_SHARE)
    corners = []
    for frame, depths in zip(frames, np.stack([near, np.minimum(far, limit)], 1), strict=True):
        fx, fy, cx, cy = frame.pinhole
        for depth in depths.tolist():
            for x, y in ((-cx / fx, cy / fy), (cx / fx, cy / fy), (-cx / fx, -cy / fy), (cx / fx, -cy / fy)):
                corners.append(
                    (frame.c2w @ torch.tensor([x * depth, y * depth, -depth, 1.0], dtype=torch.float64))[:3]
                )
    points = torch.stack(corners)
    low, high = points.amin(0), points.amax(0)
    return Box((low + high) / 2, float((high - low).max()) / 2)


# -- NSVF, Tanks and Temples ------------------------------------------------------------------------------------


def read_nsvf(folder: Path, images: str | None = None) -> Capture:
    """`intrinsics.txt`, `pose/*.txt`, `rgb/*`; a name that begins with 0_ is of training, 1_ or 2_ of test."""
    _refuse_images(images, "NSVF's pictures lie in rgb/")
    numbers = _floats(folder / "intrinsics.txt")
    if len(numbers) == 16:
        fx, fy, cx, cy = numbers[0], numbers[5], numbers[2], numbers[6]
    elif len(numbers) >= 3:
        (fx, cx, cy), fy = numbers[:3], numbers[0]
    else:
        raise DataError(
            f"{folder / 'intrinsics.txt'} holds {len(numbers)} numbers; give a 4x4 matrix, or f cx cy"
        )
    frames = []
    for path in sorted((folder / "pose").glob("*.txt")):
        values = _floats(path)
        if len(values) != 16:
            raise DataError(f"{path} holds {len(values)} numbers; a pose has 16")
        candidates = [folder / "rgb" / f"{path.stem}{suffix}" for suffix in PICTURES]
        picture = next((p for p in candidates if p.is_file()), candidates[0])
        matrix = torch.tensor(values, dtype=torch.float64).reshape(4, 4) @ OPENCV
        # the principal point says what size the camera was measured on: the pictures may be smaller
        size = (round(2 * cx), round(2 * cy))
        split: Any = {"0": "train", "1": "test", "2": "test"}.get(path.stem.split("_")[0], "")
        frames.append(
            Frame(
                picture,
                read_pose(matrix.tolist(), str(path)),
                Intrinsics((fx, fy), (cx, cy), size),
                split=split,
            )
        )
    if any(frame.path.stem.startswith("2_") for frame in frames):  # then 1_ is for choosing settings: neither
        frames = [frame for frame in frames if not frame.path.stem.startswith("1_")]
    return Capture(frames, _bbox(folder / "bbox.txt"))


def _bbox(path: Path) -> Box | None:
    if not path.is_file():
        return None
    values = _floats(path)
    if len(values) < 6:
        raise DataError(f"{path} holds {len(values)} numbers; a box has 6")
    low, high = torch.tensor(values[:3], dtype=torch.float64), torch.tensor(values[3:6], dtype=torch.float64)
    if not bool((high > low).all()):
        raise DataError(f"{path}: the box's second corner is not beyond its first")
    return Box((low + high) / 2, MARGIN * float((high - low).max()) / 2)


def _floats(path: Path) -> list[float]:
    try:
        values = [float(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as numbers: {error}") from None
    if not all(map(math.isfinite, values)):
        raise DataError(f"{path} holds NaN or infinity")
    return values


FORMATS = {
    "nerfstudio": Format(
        lambda path: path.name == "transforms.json" or (path / "transforms.json").is_file(), read_nerfstudio
    ),
    "llff": Format(lambda path: (path / "poses_bounds.npy").is_file(), read_llff),
    "nsvf": Format(lambda path: (path / "intrinsics.txt").is_file() and (path / "pose").is_dir(), read_nsvf),
    "colmap": Format(lambda path: bool(colmap_models(path)), read_colmap),
}

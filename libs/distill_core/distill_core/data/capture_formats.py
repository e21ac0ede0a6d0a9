"""Readers of capture folders: frames with poses in our axes (camera to world, OpenGL) and the file's own world.

| format | files | poses there |
| --- | --- | --- |
| nerfstudio, instant-ngp | transforms.json | camera to world, OpenGL axes |
| COLMAP | sparse/0/{cameras,images,points3D}.{bin,txt} | world to camera, OpenCV axes |
| LLFF | poses_bounds.npy | camera to world, columns down, right, back |
| NSVF, Tanks and Temples | intrinsics.txt, pose/*.txt, bbox.txt | camera to world, OpenCV axes |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill_core.errors import ConfigError, DataError, missing_package
from distill_core.radiance.cameras import check_pose
from distill_core.radiance.distortion import COEFFICIENTS

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NGP_SCALE, NGP_OFFSET = 0.33, 0.5  # instant-ngp puts p at 0.33 p + 0.5 of its unit cube
OPENCV = torch.diag(
    torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
)  # camera axes: y down, z forward
FAR_SHARE = 0.9  # LLFF: bounds beyond this quantile of the far ones are left outside of the box
MARGIN = 1.2  # NSVF: the box is so many times the file's


class Box(NamedTuple):
    """Where the scene is, in the file's units."""

    centre: Tensor  # (3,) float64
    half: float


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture and its camera."""

    path: Path
    c2w: Tensor  # (4, 4) float64, OpenGL axes
    pinhole: tuple[float, float, float, float]  # fx, fy, cx, cy, in pixels of `size`
    size: tuple[int, int] | None = None  # width, height that the camera was measured on; None: the picture's
    lens: tuple[float, ...] = (0.0,) * len(COEFFICIENTS)
    mask: Path | None = None
    split: Literal["", "train", "test"] = ""


@dataclass(frozen=True, eq=False)
class Capture:
    """What a folder says."""

    frames: list[Frame]
    box: Box | None = None
    z_is_up: bool = False  # else the cameras' mean up is
    fisheye: bool = False


class Format(NamedTuple):
    fits: Callable[[Path], bool]
    read: Callable[[Path, str | None], Capture]


# -- nerfstudio, instant-ngp ------------------------------------------------------------------------------------


def read_nerfstudio(folder: Path, images: str | None = None) -> Capture:
    """`transforms.json`; every intrinsic may stand in the file or in its frame."""
    path = folder / "transforms.json" if folder.is_dir() else folder
    described = _json(path)
    frames = described.get("frames")
    if not isinstance(frames, list) or not frames:
        raise DataError(f"{path} lists no frames; it must name pictures with their transform_matrix")
    splits = {
        name: split
        for key, split in (
            ("train_filenames", "train"),
            ("val_filenames", "test"),
            ("test_filenames", "test"),
        )
        for name in described.get(key) or ()
    }
    models = {
        str({**described, **frame}.get("camera_model", "")).upper()
        for frame in frames
        if isinstance(frame, dict)
    }
    fisheye = bool(described.get("is_fisheye")) or "OPENCV_FISHEYE" in models
    unknown = models - {
        "",
        "OPENCV",
        "PINHOLE",
        "SIMPLE_PINHOLE",
        "SIMPLE_RADIAL",
        "RADIAL",
        "OPENCV_FISHEYE",
    }
    if unknown or (fisheye and len(models) > 1):
        raise DataError(
            f"{path}: camera_model {', '.join(sorted(unknown or models))} is not supported; known are OPENCV, "
            "PINHOLE, SIMPLE_PINHOLE, SIMPLE_RADIAL, RADIAL, or OPENCV_FISHEYE for all"
        )
    found = [_nerfstudio_frame(path, described, frame, index, splits) for index, frame in enumerate(frames)]
    return Capture(found, _ngp_box(described, path), z_is_up=True, fisheye=fisheye)


def _nerfstudio_frame(
    path: Path, described: dict[str, Any], frame: Any, index: int, splits: dict[str, Any]
) -> Frame:
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
        raise DataError(f"{path}: frame {index} has no file_path")
    values = {**described, **frame}
    pose = _pose(frame.get("transform_matrix"), f"{path}: the transform_matrix of frame {index}")
    width, height = (_number(values.get(key), path, key) for key in ("w", "h"))
    size = (int(width), int(height)) if width and height else None
    return Frame(
        _inside(path.parent, frame["file_path"], path),
        pose,
        _pinhole(values, size, path),
        size,
        tuple(_number(values.get(name), path, name) or 0.0 for name in COEFFICIENTS),
        _inside(path.parent, values["mask_path"], path) if values.get("mask_path") else None,
        splits.get(frame["file_path"], ""),
    )


def _pinhole(
    values: dict[str, Any], size: tuple[int, int] | None, path: Path
) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy, from focal lengths, or from angles: camera_angle_* in radians, *_fov in degrees."""

    def focal(axis: str, side: int | None) -> float | None:
        if (given := _number(values.get(f"fl_{axis}"), path, f"fl_{axis}")) is not None:
            return given
        angle = _number(values.get(f"camera_angle_{axis}"), path, f"camera_angle_{axis}")
        fov = _number(values.get(f"{axis}_fov"), path, f"{axis}_fov")
        angle = angle if angle is not None else None if fov is None else math.radians(fov)
        if angle is None or side is None:
            return None
        return 0.5 * side / math.tan(angle / 2)

    width, height = size or (None, None)
    fx = focal("x", width) or focal("y", height)
    fy = focal("y", height) or fx
    if fx is None or fy is None or not (0 < fx < math.inf and 0 < fy < math.inf):
        raise DataError(
            f"{path} gives no focal length: set fl_x, or camera_angle_x with w and h, in the file or its frames"
        )
    cx, cy = (_number(values.get(key), path, key) for key in ("cx", "cy"))
    if (cx is None or cy is None) and size is None:
        raise DataError(f"{path} gives neither cx and cy nor w and h; set one of the pairs")
    return fx, fy, cx if cx is not None else width / 2, cy if cy is not None else height / 2  # type: ignore[operator]


def _ngp_box(described: dict[str, Any], path: Path) -> Box | None:
    """instant-ngp's box, by `aabb_scale`: so many times its unit cube, in the file's units."""
    side = _number(described.get("aabb_scale"), path, "aabb_scale")
    if side is None:
        return None
    scale = _number(described.get("scale"), path, "scale") or NGP_SCALE
    offset = described.get("offset") or [NGP_OFFSET] * 3
    if len(offset) != 3 or side <= 0 or scale <= 0:
        raise DataError(
            f"{path}: aabb_scale, scale and offset must be a positive number, one more, and 3 numbers"
        )
    centre = torch.tensor([(0.5 - float(value)) / scale for value in offset], dtype=torch.float64)
    return Box(centre, 0.5 * side / scale)


# -- COLMAP -----------------------------------------------------------------------------------------------------

MODELS = {  # parameters of COLMAP's camera models, by our names
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
    "OPENCV_FISHEYE": ("fx", "fy", "cx", "cy", "k1", "k2", "k3", "k4"),
}


def colmap_model(folder: Path) -> Path | None:
    """The folder of a sparse reconstruction, text or binary."""
    for place in ("sparse/0", "colmap/sparse/0", "sparse", "."):
        if any((folder / place / f"cameras.{kind}").is_file() for kind in ("bin", "txt")):
            return folder / place
    return None


def read_colmap(folder: Path, images: str | None = None) -> Capture:
    """A sparse reconstruction, through pycolmap."""
    model = colmap_model(folder)
    if model is None:
        raise DataError(f"{folder} holds no reconstruction; COLMAP writes sparse/0/cameras.bin")
    try:
        import pycolmap
    except ImportError:
        raise missing_package("pycolmap", "colmap") from None
    try:
        found = pycolmap.Reconstruction(str(model))
    except Exception as error:  # pycolmap raises what its C++ side throws
        raise DataError(f"{model} cannot be read by COLMAP: {str(error).splitlines()[0]}") from None
    pictures = folder / (images or "images")
    kinds = {camera.model.name for camera in found.cameras.values()}
    if not kinds <= set(MODELS) or ("OPENCV_FISHEYE" in kinds and len(kinds) > 1):
        raise DataError(
            f"{model}: camera models {', '.join(sorted(kinds))} are not supported together; known are "
            f"{', '.join(MODELS)}, fisheye for all or none; undistort with COLMAP's image_undistorter"
        )
    frames = [_colmap_frame(image, pictures, model) for image in found.images.values() if image.has_pose]
    points = np.array([point.xyz for point in found.points3D.values()])
    return Capture(frames, _points_box(points), fisheye="OPENCV_FISHEYE" in kinds)


def _colmap_frame(image: Any, pictures: Path, model: Path) -> Frame:
    camera = image.camera
    names = MODELS[camera.model.name]
    values = dict(zip(names, (float(value) for value in camera.params), strict=True))
    focal = values.get("f", 0.0)
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3] = torch.from_numpy(np.array(image.cam_from_world().matrix()))
    pose = _pose((torch.linalg.inv(w2c) @ OPENCV).tolist(), f"{model}: the pose of {image.name}")
    return Frame(
        _inside(pictures, image.name, model),
        pose,
        (values.get("fx", focal), values.get("fy", focal), values["cx"], values["cy"]),
        (camera.width, camera.height),
        tuple(values.get(name, 0.0) for name in COEFFICIENTS),
    )


def _points_box(points: np.ndarray) -> Box | None:
    """The box of the reconstructed points, without the outermost 2 % each way."""
    if len(points) < 8:
        return None
    low, high = np.quantile(points, [0.02, 0.98], axis=0)
    half = float((high - low).max()) / 2
    return Box(torch.from_numpy((low + high) / 2), half) if half > 0 else None


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
                _pose(matrix.tolist(), f"{path}: pose {number}"),
                (focal, focal, width / 2, height / 2),
                size,
            )
        )
    return Capture(frames, _frusta_box(frames, values[:, 15], values[:, 16]))


def _pictures(folder: Path, images: str | None) -> list[Path]:
    for name in [images] if images else ["images", "images_4", "images_8"]:
        found = sorted(p for p in (folder / str(name)).glob("*") if p.suffix.lower() in PICTURES)
        if found:
            return found
    raise DataError(f"{folder} has no pictures in {images or 'images/, images_4/ or images_8/'}")


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
        found = [folder / "rgb" / f"{path.stem}{suffix}" for suffix in PICTURES]
        picture = next((p for p in found if p.is_file()), found[0])
        matrix = torch.tensor(values, dtype=torch.float64).reshape(4, 4) @ OPENCV
        # the principal point says what size the camera was measured on: the pictures may be smaller
        size = (round(2 * cx), round(2 * cy))
        split: Any = {"0": "train", "1": "test", "2": "test"}.get(path.stem.split("_")[0], "")
        frames.append(Frame(picture, _pose(matrix.tolist(), str(path)), (fx, fy, cx, cy), size, split=split))
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


# -- what they share --------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; nerfstudio and instant-ngp write transforms.json") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds {type(values).__name__}, not an object with frames")
    return values


def _number(value: Any, path: Path, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{path}: {name} is {value!r}; it must be a finite number")
    return float(value)


def _floats(path: Path) -> list[float]:
    try:
        values = [float(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as numbers: {error}") from None
    if not all(map(math.isfinite, values)):
        raise DataError(f"{path} holds NaN or infinity")
    return values


def _pose(values: Any, what: str) -> Tensor:
    try:
        pose = torch.tensor(values, dtype=torch.float64)
        if pose.shape == (3, 4):
            pose = torch.cat([pose, torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)])
        check_pose(pose)
    except (TypeError, ValueError, ConfigError) as error:
        raise DataError(f"{what} is not usable: {error}") from None
    return pose


def _inside(folder: Path, name: str, path: Path) -> Path:
    found = (folder / name).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise DataError(f"{path}: file_path {name!r} leaves the scene's folder")
    return found if found.suffix else found.with_suffix(".png")


FORMATS = {
    "nerfstudio": Format(
        lambda path: path.name == "transforms.json" or (path / "transforms.json").is_file(), read_nerfstudio
    ),
    "llff": Format(lambda path: (path / "poses_bounds.npy").is_file(), read_llff),
    "nsvf": Format(lambda path: (path / "intrinsics.txt").is_file() and (path / "pose").is_dir(), read_nsvf),
    "colmap": Format(lambda path: colmap_model(path) is not None, read_colmap),
}

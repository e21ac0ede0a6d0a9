"""Sparse reconstructions of COLMAP, through pycolmap."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_core.data.frames import OPENCV, Box, Capture, Frame, picture_at, read_pose
from distill_core.data.intrinsics import FISHEYE, Intrinsics
from distill_core.errors import DataError, missing_package
from distill_core.radiance.cameras.distortion import COEFFICIENTS

log = logging.getLogger(__name__)
MODELS = {  # parameters of COLMAP's camera models, by our names; one that begins with ! must be 0
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fx fy cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fx fy cx cy k1 k2 p1 p2",
    "FULL_OPENCV": "fx fy cx cy k1 k2 p1 p2 k3 !k4 !k5 !k6",
    "SIMPLE_FISHEYE": "f cx cy",
    "FISHEYE": "fx fy cx cy",
    "SIMPLE_RADIAL_FISHEYE": "f cx cy k1",
    "RADIAL_FISHEYE": "f cx cy k1 k2",
    "OPENCV_FISHEYE": "fx fy cx cy k1 k2 k3 k4",
    "THIN_PRISM_FISHEYE": "fx fy cx cy k1 k2 !p1 !p2 k3 k4 !sx1 !sy1",
}
FISHEYES = (*FISHEYE, "THIN_PRISM_FISHEYE")
PLACES = (  # where reconstructions lie, in a folder of their own each or not: the first that has any
    "sparse",
    "colmap/sparse",
    "dense/sparse",
    "dense/0/sparse",
    "distorted/sparse",
    ".",
)
PICTURE_FOLDERS = ("images", "images_2", "images_4", "images_8", "input", ".")


def colmap_models(folder: Path) -> list[Path]:
    """The folders of sparse reconstructions, text or binary, that belong together."""
    for name in PLACES:
        place = folder / name
        if not place.is_dir():
            continue
        models = [path for path in (place, *sorted(place.iterdir())) if _is_model(path)]
        if models:
            return models
    return []


def _is_model(path: Path) -> bool:
    return any(
        all((path / f"{table}.{kind}").is_file() for table in ("cameras", "images"))
        for kind in ("bin", "txt")
    )


def read_colmap(folder: Path, images: str | None = None) -> Capture:
    """The reconstruction with the most views; `images` is the pictures' folder, unset: the first known one with any.

    Raises:
        DataError: no reconstruction, a damaged one, or a lens that is not supported.
    """
    places = colmap_models(folder)
    if not places:
        raise DataError(
            f"{folder} holds no reconstruction; COLMAP writes sparse/0/cameras.bin and images.bin"
        )
    models = [(place, *_views(place)) for place in places]
    model, reconstruction, views = max(models, key=lambda entry: len(entry[2]))
    if len(models) > 1:
        sizes = ", ".join(f"{place.relative_to(folder)} with {len(seen)} views" for place, _, seen in models)
        log.warning(
            "%s holds %d reconstructions, which have no common axes: %s; %s is read, the largest",
            folder,
            len(models),
            sizes,
            model.relative_to(folder),
        )
    _check_lenses(views, model)
    pictures = _pictures_folder(folder, model, images, [view.name for view in views])
    frames = [_frame(view, pictures, model) for view in views]
    points = np.array([point.xyz for point in reconstruction.points3D.values()])
    return Capture(frames, _points_box(points))


def _views(model: Path) -> tuple[Any, list[Any]]:
    """The reconstruction in a folder, and its images that have a pose."""
    try:
        import pycolmap
    except ImportError:
        raise missing_package("pycolmap", "colmap") from None
    try:
        reconstruction = pycolmap.Reconstruction(str(model))
    except Exception as error:  # pycolmap raises what its C++ side throws
        raise DataError(f"{model} cannot be read by COLMAP: {str(error).splitlines()[0]}") from None
    return reconstruction, [image for image in reconstruction.images.values() if image.has_pose]


def _check_lenses(views: list[Any], model: Path) -> None:
    kinds = {view.camera.model.name for view in views}
    if not kinds <= set(MODELS) or len({kind in FISHEYES for kind in kinds}) > 1:
        raise DataError(
            f"{model}: camera models {', '.join(sorted(kinds))} are not supported together; known are "
            f"{', '.join(MODELS)}, fisheye for all or none; undistort with COLMAP's image_undistorter"
        )


def _pictures_folder(folder: Path, model: Path, images: str | None, names: list[str]) -> Path:
    """The folder with the pictures of these names: `images`, or the first known one that has any of them."""
    # an undistorted workspace has its pictures beside its sparse/
    workspaces = [folder, *(parent for parent in model.parents if parent.is_relative_to(folder))]
    candidates = [place / name for place in workspaces for name in ((images,) if images else PICTURE_FOLDERS)]
    for place in candidates:
        if place.is_dir() and any(picture_at(place, name, model).is_file() for name in names):
            if place.name.startswith("images_") and not images:
                log.warning("%s: the full pictures are not there, those of %s are read", folder, place.name)
            return place
    return candidates[0]


def _frame(image: Any, pictures: Path, model: Path) -> Frame:
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3] = torch.from_numpy(np.array(image.cam_from_world().matrix()))
    pose = read_pose((torch.linalg.inv(w2c) @ OPENCV).tolist(), f"{model}: the pose of {image.name}")
    return Frame(picture_at(pictures, image.name, model), pose, _camera(image.camera, model))


def _camera(camera: Any, model: Path) -> Intrinsics:
    kind = camera.model.name
    names = MODELS[kind].split()
    values = dict(zip(names, (float(value) for value in camera.params), strict=True))
    wrong = [name[1:] for name in names if name.startswith("!") and values[name]]
    if wrong:
        raise DataError(
            f"{model}: {', '.join(wrong)} of a {kind} camera are not supported; undistort with COLMAP's "
            "image_undistorter"
        )
    focal = values.get("f")
    return Intrinsics(
        (values.get("fx", focal), values.get("fy", focal)),
        (values["cx"], values["cy"]),
        (camera.width, camera.height),
        tuple(values.get(name, 0.0) for name in COEFFICIENTS),
        kind in FISHEYES,
    )


def _points_box(points: np.ndarray) -> Box | None:
    """The box of the reconstructed points, without the outermost 2 % each way."""
    if len(points) < 8:
        return None
    low, high = np.quantile(points, [0.02, 0.98], axis=0)
    half = float((high - low).max()) / 2
    return Box(torch.from_numpy((low + high) / 2), half) if half > 0 else None

"""transforms.json, as nerfstudio, instant-ngp and Blender's exporters write it: one reader for all of them.

Every key that changes what rays see is honoured or refused; the others are named in one warning.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from distill_core.data.frames import Box, Capture, Frame, Mask, picture_at, read_pose
from distill_core.data.intrinsics import KEYS, number, read_intrinsics, refuse_unless_neutral
from distill_core.errors import DataError
from distill_core.files.json_tables import read_table

log = logging.getLogger(__name__)
NGP_SCALE, NGP_OFFSET = 0.33, 0.5  # instant-ngp puts p at 0.33 p + 0.5 of its unit cube
NOT_HONOURED = {  # keys that change pixels or poses, and what to do instead
    "white_transparent": "save the pictures with an alpha channel",
    "black_transparent": "save the pictures with an alpha channel",
    "fix_premult": "save the pictures as PNG, colour not multiplied by opacity",
    "normal_mts_args": "write the poses in OpenGL axes",
    "sharpen": "sharpen the pictures themselves",
    "sharpness_discard_threshold": "remove the frames that are not sharp",
    "fisheye_crop_radius": "give the frames a mask_path that is 0 beyond it",
    "envmap": "leave the environment out",
    "driver_parameters": "use pictures under one light",
    "transform_matrix_start": "give one transform_matrix",
    "transform_matrix_end": "give one transform_matrix",
}
SPLITS: tuple[tuple[str, Literal["train", "test"]], ...] = (
    ("train_filenames", "train"),
    ("val_filenames", "test"),
    ("test_filenames", "test"),
)
READ = {"frames", "file_path", "transform_matrix", "mask_path", "aabb_scale", "scale", "offset", "aabb"}
SILENT = {  # what changes neither pictures nor cameras, only how other programs show or sort them
    *("applied_transform", "applied_scale", "orientation_override", "colmap_im_id", "sharpness", "rotation"),
    *("up", "render_aabb", "importance_sampling", "n_extra_learnable_dims", "enable_ray_loading", "n_frames"),
}


def read_transforms(path: Path) -> Capture:
    """The frames of a transforms.json; intrinsics and masks may stand in the file or in its frames.

    Raises:
        DataError: damaged, no frames, or a key that cannot be honoured; the message names it.
    """
    described = _json(path)
    frames = described.get("frames")
    if not isinstance(frames, list) or not frames:
        raise DataError(f"{path} lists no frames; it must name pictures with their transform_matrix")
    _check_count(described.get("n_frames"), len(frames), path)
    _tell_unread([described, *(frame for frame in frames if isinstance(frame, dict))], path)
    parsed = [_frame(path, described, frame, index) for index, frame in enumerate(frames)]
    if len({frame.camera.fisheye for frame in parsed}) > 1:
        raise DataError(
            f"{path}: a camera_model OPENCV_FISHEYE or is_fisheye of some frames only is not supported; it is for all "
            "or none"
        )
    return Capture(_split(parsed, described, path), _box(described, path), z_is_up=True)


def _frame(path: Path, described: dict[str, Any], frame: Any, index: int) -> Frame:
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
        raise DataError(f"{path}: a frame has no file_path, number {index}")
    for values in (described, frame):
        for key, instead in NOT_HONOURED.items():
            refuse_unless_neutral(values, [key], path, instead)
    picture = picture_at(path.parent, frame["file_path"], path)
    _refuse_companions(picture, path, described)
    return Frame(
        picture,
        read_pose(frame.get("transform_matrix"), f"{path}: the transform_matrix of frame {index}"),
        read_intrinsics(described, frame, path),
        _masks(picture, frame.get("mask_path") or described.get("mask_path"), path),
    )


def _masks(picture: Path, name: Any, path: Path) -> tuple[Mask, ...]:
    """Nerfstudio's mask_path, 0 is ignored; instant-ngp's dynamic_mask_*.png beside the picture, 0 counts."""
    masks = []
    if name is not None:
        if not isinstance(name, str):
            raise DataError(f"{path}: mask_path is {name!r}; it is the name of a picture")
        masks.append(Mask(picture_at(path.parent, name, path)))
    dynamic = picture.with_name(f"dynamic_mask_{picture.stem}.png")
    return (*masks, Mask(dynamic, "marked")) if dynamic.is_file() else tuple(masks)


def _refuse_companions(picture: Path, path: Path, described: dict[str, Any]) -> None:
    """instant-ngp reads files beside a picture that would change its pixels or rays."""
    rays = picture.with_name(f"rays_{picture.stem}.dat")
    if described.get("enable_ray_loading") is not False and rays.is_file():
        raise DataError(f"{path}: {rays.name} gives rays of its own, which are not read; remove it")
    alpha = picture.with_name(f"{picture.name}.alpha{picture.suffix}")
    if alpha.is_file():
        raise DataError(f"{path}: {alpha.name} is not read; save the picture with this alpha channel")


def _check_count(value: Any, count: int, path: Path) -> None:
    stated = number(value, path, "n_frames")
    if stated is not None and stated < count:
        raise DataError(
            f"{path}: n_frames is {stated:g} where {count} are listed, and leaving frames out is not supported; "
            "remove the frames, or the key"
        )


def _tell_unread(tables: list[dict[str, Any]], path: Path) -> None:
    known = KEYS | READ | SILENT | NOT_HONOURED.keys() | {key for key, _ in SPLITS}
    unread = sorted({str(key) for table in tables for key in table} - known)
    if unread:
        log.warning("%s: keys that are not read: %s", path, ", ".join(unread[:20]))


def _split(frames: list[Frame], described: dict[str, Any], path: Path) -> list[Frame]:
    """The frames with their splits; where training views are named, those in no list are left out."""
    splits: dict[Path, Literal["train", "test"]] = {}
    present = {frame.path for frame in frames}
    for key, split in SPLITS:
        names = described.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: {key} is {str(names)[:60]!r}; it is a list of file_paths")
        for name in names:
            picture = picture_at(path.parent, name, path)
            if picture not in present:
                raise DataError(f"{path}: {key} names {name!r}, which no frame has as its file_path")
            splits[picture] = split
    marked = [
        Frame(frame.path, frame.c2w, frame.camera, frame.masks, splits.get(frame.path, ""))
        for frame in frames
    ]
    if not described.get("train_filenames"):
        return marked
    kept, count = [frame for frame in marked if frame.split], len(marked)
    if len(kept) < count:
        log.info("%s: %d of %d frames are in no list of file names", path, count - len(kept), count)
    return kept


def _box(described: dict[str, Any], path: Path) -> Box | None:
    """instant-ngp's box: `aabb_scale` times its unit cube, put into the file's units by scale and offset, or aabb."""
    if all(described.get(key) is None for key in ("aabb_scale", "scale", "offset", "aabb")):
        return None
    wrong = DataError(
        f"{path}: aabb_scale and scale must be positive numbers, offset one or 3 numbers, aabb two corners of 3"
    )
    side = number(described.get("aabb_scale"), path, "aabb_scale")
    side = 1.0 if side is None else side
    try:
        scale, offset = _placed(described, path)
    except (TypeError, ValueError, IndexError):
        raise wrong from None
    if side <= 0 or scale <= 0 or offset.shape != (3,) or not bool(offset.isfinite().all()):
        raise wrong
    return Box((0.5 - offset) / scale, 0.5 * side / scale)


def _placed(described: dict[str, Any], path: Path) -> tuple[float, torch.Tensor]:
    """Scale and offset (3,) of instant-ngp's unit cube; its aabb goes first."""
    if described.get("aabb") is not None:
        low, high = torch.tensor(described["aabb"], dtype=torch.float64)
        scale = 1 / float((high - low).abs().max().clamp_min(1e-6))
        return scale, 0.5 - scale * (low + high) / 2
    stated = number(described.get("scale"), path, "scale")
    offset = described.get("offset")
    values = torch.tensor(NGP_OFFSET if offset is None else offset, dtype=torch.float64)
    return NGP_SCALE if stated is None else stated, values.expand(3) if values.ndim == 0 else values


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_table(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; nerfstudio and instant-ngp write transforms.json, Blender's exporters "
            "transforms_train.json and transforms_test.json"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no JSON table with frames: {error}") from None

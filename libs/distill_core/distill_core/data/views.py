"""Frames of a capture as posed images: pictures and masks are read, cameras scaled to the pixels that are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_core.data.frames import Frame, Mask
from distill_core.data.posed import PosedImages, check_total, read_image, shrink
from distill_core.errors import DataError
from distill_core.pictures import stored_size, together


def load_views(frames: Sequence[Frame], transform: Tensor | None = None, *, factor: int = 1) -> PosedImages:
    """The pictures of `frames`, their cameras moved by the similarity `transform` (4, 4).

    Raises:
        DataError: damaged or missing pictures, all of them at once; differing sizes, or sizes that do not go with the
            file's intrinsics.
    """
    images, known = _pictures(frames, factor)
    height, width = images.shape[1:3]
    pinholes = [_scaled(frame, width, height, factor) for frame in frames]
    poses = [frame.c2w if transform is None else _moved(frame.c2w, transform) for frame in frames]
    fisheye, lenses = frames[0].camera.fisheye, [frame.lens for frame in frames]
    return PosedImages(
        images,
        torch.stack(poses).float(),
        torch.tensor(pinholes),
        torch.tensor(lenses) if fisheye or any(any(lens) for lens in lenses) else None,
        fisheye,
        known=None if bool(known.all()) else known,
    )


def _pictures(frames: Sequence[Frame], factor: int) -> tuple[Tensor, Tensor]:
    """RGBA (N, H, W, 4), and which pixels no mask ignores (N, H, W)."""
    images, known, problems = None, torch.empty(0), []
    for index, frame in enumerate(frames):
        try:
            image, counts = _picture(frame, factor)
            if images is None:
                check_total(len(frames), *image.shape[:2])
                images = torch.empty(len(frames), *image.shape)
                known = torch.empty(images.shape[:3], dtype=torch.bool)
            _check_shape(frame, image, images, factor)
            images[index], known[index] = image, counts
        except DataError as error:
            if error.field in ("data", "data.factor"):  # of all pictures, not of this one
                raise
            problems.append(error)
    if problems:
        raise together(problems, len(frames))
    assert images is not None, "a reader gives at least one frame"
    return images, known


def _check_shape(frame: Frame, image: Tensor, others: Tensor, factor: int) -> None:
    (height, width), (was_high, was_wide) = image.shape[:2], others.shape[1:3]
    found = width * factor, height * factor
    if (height, width) != (was_high, was_wide):
        raise DataError(
            f"{frame.path} has {found[0]} x {found[1]} pixels, the views before it {was_wide * factor} x "
            f"{was_high * factor}; all views must have one size"
        )
    if frame.size is not None and not _same_shape(found, frame.size):
        raise DataError(
            f"{frame.path} has {found[0]} x {found[1]} pixels, and its camera was measured on {frame.size[0]} x "
            f"{frame.size[1]}; the two must have one shape"
        )


def _picture(frame: Frame, factor: int) -> tuple[Tensor, Tensor]:
    """RGBA (H, W, 4) and the pixels that count (H, W), both averaged over factor x factor pixels."""
    # a camera that was measured on the pixels as they are stored sees them so, whatever the EXIF orientation says
    turn = frame.size is None or not _same_shape(stored_size(frame.path), frame.size)
    image = read_image(frame.path, turn=turn)
    height, width = image.shape[:2]
    counts = torch.ones(height, width, dtype=torch.bool)
    for mask in frame.masks:
        counts &= _read_mask(mask, frame, (width, height))
    # a coarse pixel counts if all of its pixels do: else its colour is in part what is to be ignored
    whole = shrink(counts[..., None].float(), factor, frame.path)[..., 0] == 1
    if frame.masks and not bool(whole.any()):
        said = "0 is ignored" if frame.masks[0].ignored == "black" else "all but 0 is ignored"
        raise DataError(
            f"{frame.masks[0].path} ignores every pixel of its picture ({said}); remove the frame, or invert the mask"
        )
    return shrink(image, factor, frame.path), whole


def _read_mask(mask: Mask, frame: Frame, size: tuple[int, int]) -> Tensor:
    """Mask (H, W) bool of the pixels that count."""
    marked = (read_image(mask.path)[..., :3] > 0).any(-1)
    if marked.shape != size[::-1]:
        raise DataError(
            f"{mask.path} is {marked.shape[1]} x {marked.shape[0]}, its picture {frame.path.name} {size[0]} x "
            f"{size[1]}; a mask covers its picture"
        )
    return marked if mask.ignored == "black" else ~marked


def _scaled(frame: Frame, width: int, height: int, factor: int) -> list[float]:
    """fx, fy, cx, cy in pixels of the views, `factor` times smaller than their pictures."""
    fx, fy, cx, cy = frame.camera.pinhole((width * factor, height * factor))
    measured = frame.size or (width * factor, height * factor)
    across, down = width / measured[0], height / measured[1]
    return [fx * across, fy * down, cx * across, cy * down]


def _same_shape(found: tuple[int, int], declared: tuple[int, int]) -> bool:
    """Has a picture the shape that its camera was measured on, or is it a smaller copy, sides rounded to pixels?"""
    height = declared[1] * found[0] / declared[0]
    return abs(height / found[1] - 1) < 0.02 or (found[0] < declared[0] and abs(height - found[1]) < 1)


def _moved(c2w: Tensor, transform: Tensor) -> Tensor:
    """A pose (4, 4) after a similarity: axes are turned, only the centre is scaled."""
    scale = torch.linalg.det(transform[:3, :3]) ** (1 / 3)
    moved = transform @ c2w
    moved[:3, :3] /= scale
    return moved

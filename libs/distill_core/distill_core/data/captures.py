"""Captures of real scenes, as people have them: nerfstudio and instant-ngp, COLMAP, LLFF, NSVF and Tanks-and-Temples.

Readers (`capture_formats.py`) give frames in the file's own world. This module sets test views aside, and moves the
world into the box that fields live in; the matrix that does it is `SceneSpec.transform`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.artifacts import SceneSpec
from distill_core.config import Config as SourceConfig
from distill_core.config import DataPath, PathMark
from distill_core.data.capture_formats import FORMATS
from distill_core.data.frames import Box, Capture, Frame
from distill_core.data.posed import SceneSource
from distill_core.data.source import existing
from distill_core.data.views import load_views
from distill_core.errors import DataError

log = logging.getLogger(__name__)
BOUND = 1.5  # half the side of the scene's box after the move, as NeRF-synthetic scenes have it


class CapturedScene(SceneSource):
    """A folder of photographs with poses, in any known format."""

    class Config(SourceConfig):
        """The folder, and options of reading it."""

        name: Literal["capture"] = "capture"
        path: DataPath
        format: Literal["auto", "nerfstudio", "colmap", "llff", "nsvf"] = "auto"
        # the pictures' folder, for COLMAP and LLFF; unset: images, images_4 …
        images: Annotated[str, PathMark(inside="path")] | None = None
        factor: int = Field(1, ge=1, le=64)  # pictures are averaged over factor x factor pixels
        test_every: int = Field(8, ge=2, le=1000)  # where the format names no test views
        max_views: int = Field(1000, ge=2, le=100_000)  # evenly thinned out above it
        bound: float | None = Field(
            None, gt=0
        )  # half the side of the box, in the file's units; unset: the file's, or derived from the cameras
        background: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of previews, where pictures have alpha

    def __init__(self, config: Config) -> None:
        folder = existing(config.path)
        capture = read_capture(folder, config.format, images=config.images)
        frames = _present(capture.frames, folder)
        if len(frames) > config.max_views:
            frames = [frames[i * len(frames) // config.max_views] for i in range(config.max_views)]
        transform = into_box(capture, frames, bound=config.bound)
        views = load_views(frames, transform, factor=config.factor)
        held = [index for index, frame in enumerate(frames) if frame.split == "test"]
        held = held or list(range(0, len(frames), config.test_every))
        rest = [index for index in range(len(frames)) if index not in set(held)]
        if not rest:
            raise DataError(f"{folder} has no training views: all {len(frames)} pictures are test views")
        fx, width = float(views.intrinsics[0, 0]), views.images.shape[2]
        super().__init__(
            config,
            train=views.some(rest),
            test=views.some(held),
            spec=SceneSpec(
                field="",
                bound=BOUND,
                radius=float(views.c2w[:, :3, 3].norm(dim=-1).median()),
                fov_degrees=math.degrees(2 * math.atan(0.5 * width / fx)),
                background=config.background,
                transform=tuple(transform.flatten().tolist()),
            ),
        )


def read_capture(folder: Path, name: str = "auto", *, images: str | None = None) -> Capture:
    """The frames of a folder, by the format `name` or by what lies in it.

    Raises:
        DataError: no known format, a damaged file, an unusable pose or lens; the message names the file.
    """
    if name == "auto":
        formats = [known for known, reader in FORMATS.items() if reader.fits(folder)]
        if not formats:
            blender = (folder / "transforms_train.json").is_file()
            raise DataError(
                f"{folder} is not a known capture: it has neither transforms.json (nerfstudio, instant-ngp), "
                "sparse/ (COLMAP), poses_bounds.npy (LLFF) nor pose/ with intrinsics.txt (NSVF)"
                + ("; transforms_train.json is read by data.name = 'blender'" if blender else ""),
                field="data.path",
            )
        name = formats[0]
    capture = FORMATS[name].read(folder, images)
    if not capture.frames:
        raise DataError(f"{folder} lists no pictures with poses", field="data.path")
    return capture


def _present(frames: list[Frame], folder: Path) -> list[Frame]:
    """The frames whose pictures exist; one warning for the others."""
    there = [frame for frame in frames if frame.path.is_file()]
    missing = [frame.path for frame in frames if not frame.path.is_file()]
    if len(there) < 2:
        raise DataError(
            f"{folder} lists {len(frames)} pictures and has {len(there)} of them; {missing[0]} is missing",
            field="data.path",
        )
    if missing:
        log.warning("%d of %d pictures are missing, e.g. %s", len(missing), len(frames), missing[0])
    return sorted(there, key=lambda frame: frame.path.as_posix())


def into_box(capture: Capture, frames: list[Frame], *, bound: float | None) -> Tensor:
    """The similarity (4, 4) from the file's world into [-BOUND, BOUND]^3, world +z up."""
    poses = torch.stack([frame.c2w for frame in frames])
    box = capture.box or _around_focus(poses)
    half = bound or box.half
    turn = torch.eye(3, dtype=torch.float64) if capture.z_is_up else _upright(poses)
    scale = BOUND / half
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3] = scale * turn
    transform[:3, 3] = -scale * (turn @ box.centre)
    return transform


def _around_focus(poses: Tensor) -> Box:
    """A box around the point that the cameras look at, out to half way to them."""
    centres, axes = poses[:, :3, 3], poses[:, :3, 2]
    off_axis = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    # the point nearest to all optical axes; where these are parallel, nearest to the cameras' middle
    system, middle = off_axis.mean(0) + 1e-6 * torch.eye(3), centres.mean(0)
    target = (off_axis @ centres[:, :, None]).mean(0).squeeze(-1) + 1e-6 * middle
    focus = torch.linalg.solve(system, target)
    away = float((centres - focus).norm(dim=-1).median())
    return Box(focus, max(away / 2, 1e-6))


def _upright(poses: Tensor) -> Tensor:
    """The rotation (3, 3) that turns what is up for the cameras to +z.

    People hold cameras level: up is what all of their right axes are square to. Where these agree too much to say
    so (a forward-facing capture), it is the mean of the cameras' own up.
    """
    right, up = poses[:, :3, 0], torch.nn.functional.normalize(poses[:, :3, 1].mean(0), dim=0)
    spread, axes = torch.linalg.eigh(right.T @ right)
    if float(spread[1]) > 0.05 * float(spread[2]):
        up = axes[:, 0] * (1 if float(axes[:, 0] @ up) > 0 else -1)
    target = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    if float(up[2]) < -1 + 1e-9:
        return torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    axis = torch.linalg.cross(up, target)
    skew = torch.tensor(
        [[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]], dtype=torch.float64
    )
    return torch.eye(3, dtype=torch.float64) + skew + skew @ skew / (1 + float(up[2]))  # Rodrigues


SOURCES = {"capture": CapturedScene}

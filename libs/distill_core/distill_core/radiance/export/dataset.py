"""A scene as a data set: its own renders with their cameras, as nerfstudio and instant-ngp read them.

transforms.json holds camera-to-world poses (OpenGL axes) in the input's frame, and the box as instant-ngp's aabb_scale,
scale and offset: p lies at scale p + offset of a unit cube. Pictures are RGBA, colour not multiplied by opacity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill_core.artifacts import SceneSpec
from distill_core.data.transforms_json import read_transforms
from distill_core.errors import DataError
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.radiance.cameras.distortion import COEFFICIENTS
from distill_core.radiance.export.frame import from_input, to_input
from distill_core.radiance.scenes.gaussians import GaussianScene, rasterize
from distill_core.radiance.scenes.scene import Scene, render

TEST_EVERY = 8
ELEVATIONS = (-10.0, 15.0, 40.0, 65.0)  # degrees; orbits take turns
GOLDEN_ANGLE = 137.50776405003785

Draw = Callable[[Camera], tuple[Tensor, Tensor]]  # colour times opacity (H, W, 3), opacity (H, W)


def save_dataset(scene: Scene | GaussianScene, folder: Path, cameras: Sequence[Camera]) -> None:
    """Render `scene` through `cameras` (in the training box) into `folder`: images/ and transforms.json.

    Every eighth view is named a test view.
    """
    if not cameras:
        raise DataError("a data set needs at least one camera", field="cameras")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw = _draw(scene)
    frames, back = [], to_input(scene.spec)
    for number, camera in enumerate(cameras):
        name = f"images/{number:05d}.png"
        _picture(*draw(camera)).save(folder / name)
        frames.append(
            {"file_path": name, **_lens(camera), "transform_matrix": back.pose(camera.c2w).tolist()}
        )
    named = {
        "train_filenames": [f["file_path"] for i, f in enumerate(frames) if i % TEST_EVERY],
        "test_filenames": [f["file_path"] for i, f in enumerate(frames) if i % TEST_EVERY == 0],
    }
    if not named["train_filenames"]:
        named = {}
    described = {**_box(scene.spec), **named, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def orbit_cameras(spec: SceneSpec, count: int, size: int) -> list[Camera]:
    """`count` cameras of `size` x `size` pixels around the scene, at its usual distance."""
    return [
        orbit_camera(
            GOLDEN_ANGLE * number,
            ELEVATIONS[number % len(ELEVATIONS)],
            spec.radius,
            fov_degrees=spec.fov_degrees,
            width=size,
            height=size,
        )
        for number in range(count)
    ]


def read_cameras(path: Path, spec: SceneSpec) -> list[Camera]:
    """The cameras of a transforms.json in the input's frame, moved into the training box.

    Raises:
        DataError: no such file, an unusable pose, or a frame whose size the file does not say.
    """
    capture, into = read_transforms(path), from_input(spec)
    cameras = []
    for frame in capture.frames:
        if frame.size is None:
            raise DataError(f"{path} does not say how large its pictures are; set w and h", field="cameras")
        lens = frame.lens if capture.fisheye or any(frame.lens) else ()
        pose = into.pose(frame.c2w).float()
        cameras.append(Camera(pose, *frame.pinhole, *frame.size, lens, capture.fisheye))
    return cameras


def _draw(scene: Scene | GaussianScene) -> Draw:
    @torch.no_grad()
    def of_gaussians(camera: Camera) -> tuple[Tensor, Tensor]:
        splats = rasterize(scene.gaussians, camera)  # type: ignore[union-attr]
        return splats.rgb, splats.opacity

    def of_field(camera: Camera) -> tuple[Tensor, Tensor]:
        rendering = render(scene, camera, background=(0.0, 0.0, 0.0))  # type: ignore[arg-type]
        return rendering.rgb, rendering.opacity

    return of_gaussians if isinstance(scene, GaussianScene) else of_field


def _picture(rgb: Tensor, opacity: Tensor) -> Image.Image:
    plain = rgb / opacity[..., None].clamp_min(1e-6)
    rgba = torch.cat([plain, opacity[..., None]], -1).clamp(0, 1)
    return Image.fromarray((rgba * 255).round().byte().cpu().numpy())


def _lens(camera: Camera) -> dict[str, float | int | str]:
    pinhole = {"fl_x": camera.fx, "fl_y": camera.fy, "cx": camera.cx, "cy": camera.cy}
    distortion: Iterable[tuple[str, float]] = zip(COEFFICIENTS, camera.distortion)
    model = "OPENCV_FISHEYE" if camera.fisheye else "OPENCV"
    return {"camera_model": model, "w": camera.width, "h": camera.height, **pinhole, **dict(distortion)}


def _box(spec: SceneSpec) -> dict[str, float | list[float]]:
    """The smallest cube along the input's axes that holds the training box."""
    back = to_input(spec)
    half = back.scale * spec.bound * float(back.rotation.abs().sum(1).max())
    scale = 0.5 / half
    return {"aabb_scale": 1, "scale": scale, "offset": (0.5 - scale * back.shift).tolist()}

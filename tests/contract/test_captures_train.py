"""A capture through a bent lens, from its folder to a field."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill_core import api
from distill_core.radiance.analytic.procedural import render_procedural
from distill_core.radiance.cameras.camera import Camera, orbit_camera
from distill_core.recipe import load_recipe

SIZE, LENS = 48, {"k1": -0.3, "k2": 0.1, "p1": 0.002, "p2": -0.002}


def write_capture(folder: Path, *, lens: dict[str, float]) -> Path:
    """The procedural scene photographed through `LENS`, by a file that says the lens was `lens`."""
    frames = []
    for number in range(24):
        ring = orbit_camera(
            137.5 * number, 10 + 45 * (number % 3) / 2, 1.8, fov_degrees=80, width=SIZE, height=SIZE
        )
        bent = (LENS["k1"], LENS["k2"], 0.0, 0.0, LENS["p1"], LENS["p2"])
        camera = Camera(ring.c2w, ring.fx, ring.fy, ring.cx, ring.cy, SIZE, SIZE, bent)
        rgba = render_procedural(camera).clone()
        rgba[..., :3] /= rgba[..., 3:].clamp_min(1e-6)
        folder.mkdir(exist_ok=True)
        Image.fromarray((rgba.numpy() * 255).round().astype(np.uint8)).save(folder / f"{number:02d}.png")
        frames.append({"file_path": f"{number:02d}.png", "transform_matrix": ring.c2w.tolist()})
    described = {"fl_x": ring.fx, "fl_y": ring.fy, "w": SIZE, "h": SIZE, **lens, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(described))
    return folder


def test_a_capture_with_distortion_trains(tmp_path):
    torch.set_num_threads(1)
    folder = write_capture(tmp_path / "capture", lens=LENS)
    recipe = load_recipe("nerf_capture", {"data.path": str(folder), "data.bound": 1.0, **SMALL})
    where = api.context(tmp_path / "store", tmp_path / "cache")
    result = api.train(recipe.model_copy(update={"publish": None}), tmp_path / "run", where)
    assert result.figures["psnr"] > 15


SMALL = {
    "steps": 100,
    "batch_size": 512,
    "threads": 1,
    "sample_every": 1000,
    "checkpoint_every": 1000,
    "config.max_samples": 4096,
    "config.num_steps": 96,
    "network.args": {"levels": 6, "log2_table_size": 15, "min_resolution": 8, "max_resolution": 96},
}

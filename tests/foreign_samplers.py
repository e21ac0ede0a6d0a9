"""A tiny Stable Diffusion pipeline under any scheduler, and what diffusers' own pipeline draws with it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from distill_core.diffusion.noise import unit_normals
from tests.helpers import tiny_text_to_image

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = ["a red wall", "sea"]
SEED = 11
SHAPE = (4, 8, 8)


def tiny_pipeline(folder: Path, *, prediction: str = "epsilon", **unet: object) -> Path:
    """The folder, with weights that make a prompt seen in the picture: fresh ones draw the same grey for all.

    `unet` are arguments of its network.
    """
    tiny_text_to_image(folder, tokens=16, prediction=prediction)
    random = torch.Generator().manual_seed(2)
    for part, cls, std in (("unet", "UNet2DConditionModel", 0.12), ("vae", "AutoencoderKL", 0.2)):
        made = getattr(diffusers, cls)
        network = made.from_config({**made.load_config(folder / part), **(unet if part == "unet" else {})})
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std, generator=random)
        network.save_pretrained(folder / part)
    return folder


def under(folder: Path, scheduler: str, **config: object) -> Path:
    """The folder with another scheduler, a class of diffusers without its ending."""
    made = getattr(diffusers, f"{scheduler}Scheduler")(**config)
    made.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) | {"scheduler": ["diffusers", f"{scheduler}Scheduler"]}
    index.write_text(json.dumps(parts))
    return folder


def drawn_by_diffusers(
    folder: Path, count: int, guidance: float, monkeypatch: pytest.MonkeyPatch, **options: object
) -> np.ndarray:
    """Pictures (B, 3, 16, 16) in [0, 1] of `PROMPTS` from the noise of images 0 and 1 of a request with `SEED`."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def noise(draw: int) -> torch.Tensor:
        return torch.from_numpy(unit_normals([(SEED, 0), (SEED, 1)], draw, SHAPE))

    draws = iter(range(1, 1000))
    module = sys.modules[type(pipeline.scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise(next(draws)))
    told = {"num_inference_steps": count, "guidance_scale": guidance, "output_type": "pt", **options}
    return pipeline(PROMPTS, height=16, width=16, latents=noise(0), **told).images.numpy()


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    error = float(np.square(found.astype(np.float64) - wanted).mean())
    return math.inf if error == 0 else -10 * math.log10(error)

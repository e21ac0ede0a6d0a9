"""PyTorch: any denoiser of the library, and radiance fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from distill_core.artifacts import Manifest
from distill_core.diffusion.image_to_image import Beginning
from distill_core.diffusion.sampling import sample
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.radiance.cameras import Camera, focal_length, orbit_camera
from distill_core.radiance.renderer import SceneLimits, load_scene, render
from distillery_sampler.backends.base import Backend, Generator, SceneRenderer, noise
from distillery_sampler.beginnings import beginning, given_pictures, with_known_pixels
from distillery_sampler.requests import ImageItem, ImageKey, Rendered, View


def open_model(folder: Path, manifest: Manifest, *, device: str, threads: int) -> Backend:
    """The torch backend for a manifest's kind."""
    torch.set_num_threads(threads)
    return TorchScene(folder, device) if manifest.kind == "field" else TorchGenerator(folder, device)


class TorchGenerator(Generator):
    """A diffusers folder."""

    name = "torch"

    def __init__(self, folder: Path, device: str) -> None:
        self._denoiser = load_denoiser(folder, device=device).eval()
        self._device = device

    @torch.inference_mode()
    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        image = self._denoiser.image
        shape = image.channels, image.height, image.width
        cond = self._condition(items)

        def draw(k: int) -> torch.Tensor:
            return torch.from_numpy(noise(items, k, shape)).to(self._device)

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return self._denoiser.guided(x, x.new_full((len(x),), sigma), cond, key.guidance)

        x0 = sample(denoise, self._denoiser.sampler, draw, key.num_steps, self._beginning(key, items))
        pictures = self._denoiser.decode(x0).clamp(-1, 1).float().cpu().numpy()
        return with_known_pixels(pictures, items)

    def _beginning(self, key: ImageKey, items: Sequence[ImageItem]) -> Beginning | None:
        if key.begin is None:
            return None
        y = self._denoiser.encode(torch.from_numpy(given_pictures(items)).to(self._device))
        found = beginning(key.begin, y.cpu().numpy(), items)
        known = None if found.known is None else torch.from_numpy(found.known).to(self._device)
        return replace(found, y=y, known=known)

    def _condition(self, items: Sequence[ImageItem]) -> dict[str, torch.Tensor]:
        kind = self._denoiser.cond.kind
        if kind == "class_label":
            labels = [item.class_label for item in items]
            return {"class_label": torch.tensor(labels, dtype=torch.long, device=self._device)}
        if kind == "prompt":
            return self._denoiser.encode_prompts([item.prompt or "" for item in items])
        return {}


class TorchScene(SceneRenderer):
    """A field folder."""

    name = "torch"

    def __init__(self, folder: Path, device: str) -> None:
        self._scene = load_scene(folder, device=device)

    @torch.inference_mode()
    def render(self, view: View, should_stop: Callable[[], bool]) -> Rendered:
        seen = render(
            self._scene,
            self._camera(view),
            background=view.background,
            should_stop=should_stop,
            limits=SceneLimits(max_pixels=view.width * view.height),  # the engine has checked it
        )
        return Rendered(0, *(_array(part) for part in (seen.rgb, seen.depth, seen.opacity)))

    def _camera(self, view: View) -> Camera:
        spec = self._scene.spec
        fov = view.fov_degrees or spec.fov_degrees
        if view.orbit is not None:
            return orbit_camera(
                view.orbit.azimuth,
                view.orbit.elevation,
                view.orbit.radius or spec.radius,
                fov_degrees=fov,
                width=view.width,
                height=view.height,
                target=view.orbit.target,
            )
        focal = focal_length(view.width, fov)
        fx, fy, cx, cy = view.intrinsics or (focal, focal, view.width / 2, view.height / 2)
        pose = torch.as_tensor(view.pose, dtype=torch.float32)
        return Camera(pose, fx, fy, cx, cy, view.width, view.height)


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()

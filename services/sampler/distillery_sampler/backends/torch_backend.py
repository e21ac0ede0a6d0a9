"""PyTorch: any denoiser of the library, and radiance fields."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_core.artifacts import Manifest
from distill_core.diffusion.image_to_image import InitImage
from distill_core.diffusion.noise import noise_of
from distill_core.diffusion.sampling import sample
from distill_core.diffusion.super_resolution import LOW_RESOLUTION
from distill_core.errors import ArtifactError
from distill_core.kinds.cards import generator_card, scene_spec, served_by
from distill_core.kinds.loading import load_model
from distill_core.networks.adapters import plain
from distill_core.networks.denoiser import Denoiser, loading
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.routed import StoredExperts
from distill_core.networks.steering import with_negative
from distill_core.radiance.cameras.camera import Camera, focal_length, orbit_camera
from distill_core.radiance.scenes.scene import develop, load_scene, refined, render_rays
from distill_core.recipe.tables import ModelSource
from distillery_sampler.backends.base import Backend, Generator, SceneRenderer
from distillery_sampler.backends.experts import log_expert
from distillery_sampler.backends.fixed import OneThread
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.backends.torch_device import HostBuffers, Replayed, prepare
from distillery_sampler.backends.torch_shared import storages, use_threads
from distillery_sampler.engine.init_images import init_image_of, init_pictures, with_known_pixels
from distillery_sampler.engine.requests import ImageItem, ImageKey, Rendered, Tile, View
from distillery_sampler.models.memory import TORCH_LARGE, limit_malloc_arenas
from distillery_sampler.settings import SamplerSettings


def open_model(
    folder: Path, manifest: Manifest, *, threads: int, settings: SamplerSettings, weights: SharedWeights
) -> Backend:
    """The torch backend for a manifest's kind; on a GPU a generator has a thread of its own."""
    limit_malloc_arenas(TORCH_LARGE)

    def generator() -> TorchGenerator:
        with loading():
            return TorchGenerator(folder, manifest, settings, weights, threads=threads)

    if served_by(manifest) == "render":
        with loading():
            return TorchScene(folder, manifest, settings.device, threads=threads)
    return OneThread(generator) if settings.device.startswith("cuda") else generator()


class SharedBases:
    """Models that others rest on, each loaded once for all of them; `held` are those that were asked for."""

    def __init__(self, weights: SharedWeights) -> None:
        self._weights, self.held = weights, list[torch.nn.Module]()

    def folder(self, source: ModelSource) -> Path:
        """The folder of a version, fetched and verified."""
        assert source.artifact is not None
        return self._weights.fetch(source.artifact)

    def artifact(self, ref: str, *, device: str = "cpu") -> torch.nn.Module:
        """The model of a store reference, without another's low-rank factors."""
        fetch = self._weights.fetch
        model: torch.nn.Module = self._weights.get(
            ref, device, lambda: plain(load_model(fetch(ref), device=device, models=self))
        )
        self.held.append(model)
        return model


class TorchGenerator(Generator):
    """A denoiser. Adapters are module trees of their own over the very weights of one base: none is switched."""

    name = "torch"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        settings: SamplerSettings,
        weights: SharedWeights,
        *,
        threads: int,
    ) -> None:
        use_threads(threads)
        device, precision = settings.device, settings.precision
        self.on_gpu, self._threads = device.startswith("cuda"), threads
        if self.on_gpu and ":" in device:
            torch.cuda.set_device(device)  # of this thread
        bases = SharedBases(weights)
        self._bases = bases.held  # for as long as this adapter uses them

        def load() -> Any:
            if generator_card(manifest).partition is not None:  # an expert nobody asks for takes no memory
                return StoredExperts(folder, device=device, on_read=partial(log_expert, manifest.ref))
            model: Any = load_model(folder, device=device, models=bases).eval()
            return prepare(model, device, precision) if isinstance(model, DiffusersDenoiser) else model

        whole = manifest.form != "adapter"
        place = device if precision == "fp32" else f"{device} {precision}"  # adapters are over float32
        self._denoiser: Denoiser = weights.get(manifest.ref, place, load) if whole else load()
        self._device, self._to_host = device, HostBuffers()
        self._half = precision == "bf16"
        self._guided: Any = self._denoiser.guided
        if self.on_gpu and settings.cuda_graphs and generator_card(manifest).partition is None:
            self._guided = Replayed(self._denoiser.guided, (1.0, self._denoiser.sampler.guidance))

    @torch.inference_mode()
    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        use_threads(self._threads)
        with self._precision():
            return self._generate(key, items)

    def cuts(self, prompt: str) -> bool:
        parts = (*self._denoiser.modules(), *getattr(self._denoiser, "_opened", {}).values())
        encoders = (getattr(part, "text", None) for part in parts)
        text = next((encoder for encoder in encoders if encoder is not None), None)
        return text is not None and text.cuts(prompt)

    def held(self) -> dict[Hashable, int]:
        parts: list[Any] = [getattr(self._denoiser, "adapted", self._denoiser), *self._bases]
        parts += [expert for expert in getattr(self._denoiser, "_opened", {}).values()]
        text = [part.text for part in parts if getattr(part, "text", None) is not None]
        parts += [part.codec for part in parts if getattr(part, "codec", None) is not None]
        return storages([*parts, *(model for encoder in text for model in encoder.models)])

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """A plain network is in its precision already; others, over shared weights, are cast as they run."""
        if not self._half or isinstance(self._denoiser, DiffusersDenoiser):
            yield
            return
        with torch.autocast(self._device.partition(":")[0], dtype=torch.bfloat16, cache_enabled=False):
            yield

    def _generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        image = self._denoiser.image
        shape = image.channels, image.height, image.width
        cond = self._condition(key, items)

        def draw(k: int) -> torch.Tensor:
            return torch.from_numpy(noise_of(items, k, shape)).to(self._device)

        def denoise(x: torch.Tensor, *level: float) -> torch.Tensor:
            sigma, *told = (x.new_full((len(x),), value) for value in level)
            x0: torch.Tensor = self._guided(x, sigma, cond, key.guidance, *told)
            return x0

        x0 = sample(denoise, self._denoiser.sampler, draw, key.num_steps, self._init_image(key, items))
        plain = (
            self._half and isinstance(self._denoiser, DiffusersDenoiser) and self._denoiser.codec is not None
        )
        x0 = x0.bfloat16() if plain else x0
        pictures = self._to_host(self._denoiser.decode(x0).clamp(-1, 1))
        return pictures if key.init_image is None else with_known_pixels(pictures, items)

    def _init_image(self, key: ImageKey, items: Sequence[ImageItem]) -> InitImage | None:
        if key.init_image is None:
            return None
        y = self._denoiser.encode(torch.from_numpy(init_pictures(items)).to(self._device))
        init_image = init_image_of(key.init_image, y.cpu().numpy(), items)
        known = None if init_image.known is None else torch.from_numpy(init_image.known).to(self._device)
        return replace(init_image, y=y, known=known)

    def _condition(self, key: ImageKey, items: Sequence[ImageItem]) -> dict[str, torch.Tensor]:
        kind = self._denoiser.cond.kind
        if kind == "class_label":
            labels = [item.class_label for item in items]
            return {"class_label": torch.tensor(labels, dtype=torch.long, device=self._device)}
        if kind == "prompt":
            cond = self._denoiser.encode_prompts([item.prompt or "" for item in items])
            return self._with_negative(key, items, cond) if key.negative else cond
        if kind == LOW_RESOLUTION:
            return {LOW_RESOLUTION: torch.from_numpy(init_pictures(items)).to(self._device)}
        return {}

    def _with_negative(
        self, key: ImageKey, items: Sequence[ImageItem], cond: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        prompts = [item.negative or None for item in items]
        if key.negative == "guidance":
            return with_negative(self._denoiser, cond, prompts)
        steered = with_negative(self._denoiser, cond, prompts, scale=1.0)
        scales = torch.tensor([item.negative_scale for item in items])
        return {**steered, "nasa_scale": (steered["nasa_scale"].cpu() * scales).to(self._device)}


class TorchScene(SceneRenderer):
    """A field folder."""

    name = "torch"

    def __init__(self, folder: Path, manifest: Manifest, device: str, *, threads: int) -> None:
        use_threads(threads)
        self.on_gpu, self._threads = device.startswith("cuda"), threads
        self._scene = refined(load_scene(folder, device=device))
        described, bound = scene_spec(manifest), self._scene.spec.bound
        published = None if described is None else described.bound
        if published is not None and published != bound:
            raise ArtifactError(
                f"{manifest.ref} is said to lie in the box of half side {published:g}, but its field was trained in "
                f"{bound:g}; publish it again"
            )

    @torch.inference_mode()
    def render(self, tiles: Sequence[Tile], *, normals: bool = False) -> list[Rendered]:
        use_threads(self._threads)
        cameras = [self._camera(tile.view).reduced(tile.region.factor) for tile in tiles]
        rays = [camera.rays(tile.region.rows) for camera, tile in zip(cameras, tiles, strict=True)]
        out = []
        for tile, camera, rendered in zip(
            tiles, cameras, render_rays(self._scene, rays, normals=normals), strict=True
        ):
            seen = develop(self._scene, rendered, camera.width, tile.view.background)
            normal = None if seen.normal is None else _array(seen.normal)
            rgb, depth, opacity = (_array(part) for part in (seen.rgb, seen.depth, seen.opacity))
            out.append(Rendered(0, rgb, depth, opacity, normal, tile.region))
        return out

    def held(self) -> dict[Hashable, int]:
        occupied = self._scene.occupied
        return {**storages([self._scene.field]), id(occupied): occupied.nbytes}

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
        return Camera(pose, fx, fy, cx, cy, view.width, view.height, view.distortion, view.fisheye)


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()

"""What evaluates a model. Backends are called from several model threads and hold no request state."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from distill_core.artifacts import Manifest
from distill_core.diffusion.noise import unit_normal
from distill_core.errors import ArtifactError, missing_package
from distillery_sampler.requests import ImageItem, ImageKey, Rendered, View

ONNX_TARGET = "onnx-fp32"


class Generator(abc.ABC):
    """A denoiser that is sampled."""

    name: str

    @abc.abstractmethod
    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        """Pictures float32 (B, C, H, W) in [-1, 1]; picture i depends on `key` and `items[i]` alone."""


class SceneRenderer(abc.ABC):
    """A radiance field that is looked at."""

    name: str

    @abc.abstractmethod
    def render(self, view: View, should_stop: Callable[[], bool]) -> Rendered:
        """One view; gives up soon after `should_stop()` turns true."""


Backend = Generator | SceneRenderer


def noise(items: Sequence[ImageItem], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """The `draw`-th noise of each item, (B, *shape)."""
    return np.stack([unit_normal(item.seed, item.index, draw, shape) for item in items])


def choose(manifest: Manifest, wanted: str) -> str:
    """`onnxruntime` or `torch` for a model, given the setting `backend`.

    Raises:
        ArtifactError: a kind of model that is not sampled, or no ONNX export where one is demanded.
        Unavailable: the package it needs is not installed.
    """
    if manifest.kind not in ("denoiser", "field"):
        raise ArtifactError(f"{manifest.ref} is a {manifest.kind}; a sampler serves denoisers and fields")
    if manifest.kind == "denoiser" and not (manifest.image and manifest.cond and manifest.sampler):
        raise ArtifactError(f"{manifest.ref}: its manifest lacks image, cond or sampler; publish it again")
    has_onnx = ONNX_TARGET in manifest.exports
    if wanted == "onnxruntime" and not has_onnx:
        raise ArtifactError(
            f"{manifest.ref} has no {ONNX_TARGET} export; run: distillery convert {manifest.ref}"
        )
    name = "onnxruntime" if has_onnx and wanted != "torch" else "torch"
    if importlib.util.find_spec(name) is None:
        raise missing_package(name, "sampler")
    return name


def open_backend(folder: Path, manifest: Manifest, name: str, *, device: str, threads: int) -> Backend:
    """Load a model's files, already verified, into a backend."""
    if name == "onnxruntime":
        from distillery_sampler.backends.onnx_backend import OnnxGenerator

        return OnnxGenerator(
            folder / "exports" / ONNX_TARGET, folder / "tokenizer", manifest, threads=threads
        )
    from distillery_sampler.backends import torch_backend

    return torch_backend.open_model(folder, manifest, device=device, threads=threads)

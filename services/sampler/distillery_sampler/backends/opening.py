"""Which backend evaluates a model, and its opening. A backend's libraries are imported when it is opened."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, missing_package
from distillery_sampler.backends.base import Backend
from distillery_sampler.backends.shared import SharedWeights

ONNX_TARGET = "onnx-fp32"


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
    if manifest.kind == "field":  # its marching is not in an exported graph
        wanted = "torch"
    has_onnx = ONNX_TARGET in manifest.exports
    if wanted == "onnxruntime" and not has_onnx:
        raise ArtifactError(
            f"{manifest.ref} has no {ONNX_TARGET} export; run: distillery convert {manifest.ref}"
        )
    name = "onnxruntime" if has_onnx and wanted != "torch" else "torch"
    if importlib.util.find_spec(name) is None:
        raise missing_package(name, {"torch": "train"}.get(name, "sampler"))
    return name


def open_backend(
    folder: Path, manifest: Manifest, name: str, *, device: str, threads: int, weights: SharedWeights
) -> Backend:
    """Load a model's files, already verified, into a backend."""
    if name == "onnxruntime":
        from distillery_sampler.backends.onnx_backend import OnnxGenerator

        return OnnxGenerator(folder, folder / "exports" / ONNX_TARGET, manifest, threads=threads)
    from distillery_sampler.backends import torch_backend

    return torch_backend.open_model(folder, manifest, device=device, threads=threads, weights=weights)

"""Choice of a model's backend, and its opening. A backend's libraries are imported when it is opened."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, missing_package
from distill_core.kinds.cards import generator_card, served_by
from distillery_sampler.backends.base import Backend, Functions, Generator
from distillery_sampler.backends.fixed import BUCKETS, Padded, PaddedFunctions
from distillery_sampler.backends.shared import SharedWeights
from distillery_sampler.settings import SamplerSettings

RUNTIMES = {"onnx": "onnxruntime", "trt": "tensorrt"}  # by what an export's name begins with
PACKAGES = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), "tensorrt": ("tensorrt",)}
EXTRAS = {"torch": "train", "onnxruntime": "sampler", "tensorrt": "trt"}


class Choice(NamedTuple):
    """Backend of a model, by name, and the export that it runs; None is the model itself."""

    backend: str
    target: str | None
    precision: str


def check_kind(manifest: Manifest) -> None:
    """Refuse a kind of model that is not sampled: what it takes and answers cannot be said either."""
    if not served_by(manifest):
        raise ArtifactError(
            f"{manifest.ref} is a {manifest.kind}, which no sampler serves; `distillery models` shows the kinds",
            field="model",
        )
    if served_by(manifest) == "call" and not manifest.signature.functions:
        raise ArtifactError(
            f"{manifest.ref} does not say what it takes and answers: its signature is empty; publish it again",
            field="model",
        )


def usable(manifest: Manifest, settings: SamplerSettings) -> list[Choice]:
    """The `choices` whose packages are installed.

    Raises:
        ArtifactError: as `choices`. Unavailable: a package is missing.
    """
    allowed = choices(manifest, settings)
    lacking = {choice: _lacking(choice) for choice in allowed}
    if all(lacking.values()):
        package = lacking[allowed[-1]]
        raise missing_package(package, EXTRAS[allowed[-1].backend])
    return [choice for choice in allowed if not lacking[choice]]


def _lacking(choice: Choice) -> str:
    """The package that a choice needs and that is not installed; empty if none is."""
    packages = PACKAGES[choice.backend]
    return next((name for name in packages if importlib.util.find_spec(name) is None), "")


def choices(manifest: Manifest, settings: SamplerSettings) -> list[Choice]:
    """Of the setting `targets` those that the model has and the setting `backend` allows, or torch.

    The first is to be used. Others follow only where it is TensorRT's, whose engines may not fit this machine.

    Raises:
        ArtifactError: a kind of model that is not sampled, or no export where one is demanded.
    """
    check_kind(manifest)
    card = generator_card(manifest)
    if served_by(manifest) == "generate" and not (card.image and card.cond and card.sampler):
        raise ArtifactError(f"{manifest.ref}: its manifest lacks image, cond or sampler; publish it again")
    # a field's marching is not in an exported graph
    backend = "torch" if served_by(manifest) == "render" else settings.backend
    runtimes: tuple[str, ...] = ("onnxruntime", "tensorrt")
    if served_by(manifest) == "call":  # engines are of denoisers
        runtimes = ("onnxruntime",)
        _refuse_engines(manifest, backend)
    allowed = [t for t in settings.targets if _runtime(t) in runtimes and backend in ("auto", _runtime(t))]
    targets = [target for target in allowed if target in manifest.exports]
    if not targets:
        _require_no_export(manifest, backend, allowed, settings)
        return [Choice("torch", None, "fp32" if served_by(manifest) == "render" else settings.precision)]
    options = [Choice(_runtime(target), target, target.rpartition("-")[2]) for target in targets]
    last = next((at for at, choice in enumerate(options) if choice.backend != "tensorrt"), len(options) - 1)
    return options[: last + 1]


def _refuse_engines(manifest: Manifest, wanted: str) -> None:
    if wanted == "tensorrt":
        raise ArtifactError(
            f"{manifest.ref} is a {manifest.kind}, which no TensorRT engine runs here; set "
            "DISTILLERY_SAMPLER_BACKEND to auto, onnxruntime or torch"
        )


def _require_no_export(
    manifest: Manifest, wanted: str, allowed: list[str], settings: SamplerSettings
) -> None:
    if wanted in ("auto", "torch"):
        return
    if not allowed:
        raise ArtifactError(
            f"backend {wanted} runs none of the targets {', '.join(settings.targets)}; "
            "set DISTILLERY_SAMPLER_TARGETS"
        )
    raise ArtifactError(
        f"{manifest.ref} has no {' or '.join(allowed)} export; "
        f"run: distillery convert {manifest.ref} --target {allowed[0]}"
    )


def open_backend(
    folder: Path,
    manifest: Manifest,
    choice: Choice,
    *,
    threads: int,
    settings: SamplerSettings,
    weights: SharedWeights,
) -> Backend:
    """Load a model's files, already verified, into a backend.

    Raises:
        ArtifactError: damaged files, or engines of another machine. Unavailable: a package or device is missing.
    """
    if lacking := _lacking(choice):
        raise missing_package(lacking, EXTRAS[choice.backend])
    opened = _opened(folder, manifest, choice, threads, settings, weights)
    sizes = settings.buckets or (BUCKETS if opened.on_gpu else None)
    if sizes and isinstance(opened, Functions):
        return PaddedFunctions(opened, sizes)
    return Padded(opened, sizes) if sizes and isinstance(opened, Generator) else opened


def _opened(
    folder: Path,
    manifest: Manifest,
    choice: Choice,
    threads: int,
    settings: SamplerSettings,
    weights: SharedWeights,
) -> Backend:
    if served_by(manifest) == "call":
        return _functions(folder, manifest, choice, threads, settings, weights)
    if choice.target is None:
        from distillery_sampler.backends import torch_backend

        return torch_backend.open_model(folder, manifest, threads=threads, settings=settings, weights=weights)
    exports = folder / "exports" / choice.target
    if choice.backend == "tensorrt":
        from distillery_sampler.backends.tensorrt_backend import open_tensorrt

        return open_tensorrt(folder, exports, manifest, weights.cache)
    from distillery_sampler.backends.onnx_backend import open_onnx

    return open_onnx(folder, exports, manifest, threads=threads, rewrite=settings.rewrite_graphs)


def _functions(
    folder: Path,
    manifest: Manifest,
    choice: Choice,
    threads: int,
    settings: SamplerSettings,
    weights: SharedWeights,
) -> Functions:
    if choice.target is None:
        from distillery_sampler.backends.torch_functions import TorchFunctions

        return TorchFunctions(folder, manifest, settings, weights, threads=threads)
    from distillery_sampler.backends.onnx_functions import OnnxFunctions

    exports = folder / "exports" / choice.target
    return OnnxFunctions(exports, manifest, threads=threads, rewrite=settings.rewrite_graphs)


def _runtime(target: str) -> str:
    return RUNTIMES.get(target.partition("-")[0], "")

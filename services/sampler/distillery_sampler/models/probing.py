"""Probes: what a model's functions answered when it was published, asked again when it is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill_core.artifacts import Manifest
from distill_core.errors import ArtifactError, ConfigError, DistilleryError, out_of_memory
from distill_core.probe import Probe, read_probe
from distillery_sampler.backends.base import Functions
from distillery_sampler.backends.fixed import PaddedFunctions
from distillery_sampler.engine.predict import cost_by
from distillery_sampler.engine.requests import CallKey
from distillery_sampler.models.tuning import Tuned, layouts
from distillery_sampler.settings import SamplerSettings

MAX_BATCH = 32
# of an output, relative to its largest value, by precision; of whole numbers the share that may differ
DIFFERENCE = {"fp32": 0.005, "fp16": 0.03, "bf16": 0.1, "int8": 0.25}
DISAGREEING = 0.01


def answer_probes(
    backend: Functions, folder: Path, manifest: Manifest, precision: str, settings: SamplerSettings
) -> Tuned:
    """Ask each function what its probe asks, and find how large a batch may be.

    Raises:
        ArtifactError: a damaged probe, or an answer that differs from that of the published model.
    """
    slowest = 0.0  # seconds by cost
    for name, probe in read_probe(folder).items():
        inputs = _inputs(manifest, name, probe)
        _compare(manifest, name, probe, _answered(backend, manifest, name, inputs), DIFFERENCE[precision])
        started = time.perf_counter()  # the first call also finds its algorithms
        _answered(backend, manifest, name, inputs)
        seconds, items = time.perf_counter() - started, len(next(iter(inputs.values())))
        shapes = tuple((key, values.shape[1:]) for key, values in inputs.items())
        one = {key: values[0] for key, values in inputs.items()}
        slowest = max(slowest, seconds / items / cost_by(manifest.signature)(CallKey(name, shapes), one))
        if (
            isinstance(backend, PaddedFunctions)
            and backend.on_gpu
            and manifest.signature.functions[name].batched
        ):
            for size in backend.sizes:  # no caller waits for the first time of a size
                backend.call(name, [one] * size)
    most = int(settings.max_batch_s / slowest) if slowest else MAX_BATCH
    batch = settings.max_batch or max(1, min(MAX_BATCH, most))
    return Tuned(layouts(settings, on_gpu=backend.on_gpu)[0], batch, slowest)


def _inputs(manifest: Manifest, name: str, probe: Probe) -> dict[str, np.ndarray]:
    try:
        return manifest.signature.function(name).checked(probe.inputs)
    except ConfigError as error:
        raise ArtifactError(
            f"{manifest.ref} has a probe of {name} that its signature does not allow: {error}; publish it again"
        ) from None


def _answered(
    backend: Functions, manifest: Manifest, name: str, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    try:
        return backend.run(name, inputs)
    except DistilleryError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{manifest.ref} cannot answer {name}: {reason}; publish it again") from error


def _compare(
    manifest: Manifest, name: str, probe: Probe, outputs: Mapping[str, np.ndarray], relative: float
) -> None:
    for key, found in probe.differences(outputs).items():
        allowed = relative if probe.outputs[key].dtype.kind == "f" else DISAGREEING
        if not found <= allowed:
            raise ArtifactError(
                f"{manifest.ref} answers differently than when it was published: output {key} of its probe of "
                f"{name} is off by {found:.2g}, and {allowed:g} is allowed; convert or publish it again"
            )

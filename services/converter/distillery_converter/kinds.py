"""The graphs of a model by its kind: those that are built here, and for every other kind what its `graphs` list."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds import base, find_kind
from distill_core.kinds.base import Models
from distill_core.kinds.loading import StoreModels
from distillery_converter.calibration import COUNT, Arrays
from distillery_converter.fields import field_graphs
from distillery_converter.frechet import real_pictures
from distillery_converter.graph import Graph
from distillery_converter.graphs import load_graphs
from distillery_converter.targets import TARGETS, Target

Build = Callable[[Path, Manifest, Models, Target], list[Graph]]


def graphs_of(folder: Path, source: Manifest, store: ArtifactStore, cache: Path, goal: Target) -> list[Graph]:
    """All graphs of the model in `folder`, which is `source`; `store` has what it rests on.

    Raises:
        ArtifactError: damaged files, or a model without graphs. ConfigError: none of it may be in the target's form.
    """
    build = BUILDERS.get(source.kind, _listed)
    return build(folder, source, StoreModels(store, cache), goal)


def _listed(folder: Path, source: Manifest, models: Models, goal: Target) -> list[Graph]:
    kind = find_kind(source.kind)
    graphs = kind.graphs(kind.load(folder, models=models), source)
    if not graphs:
        raise ArtifactError(f"models of kind {source.kind} have no graphs to convert", field="artifact")
    for graph in graphs:
        _check_allowed(graph, source, goal)
    return [_adapted(graph, folder, source) for graph in graphs]


def _check_allowed(graph: base.Graph, source: Manifest, goal: Target) -> None:
    """Refuse a target whose precision a graph excludes, or whose engines take no such graph."""
    why = ""
    if goal.precision not in graph.precisions:
        why = f"needs more than {goal.precision} and is exported in {', '.join(graph.precisions)} only"
    elif goal.runtime == "tensorrt" and (len(graph.outputs) > 1 or graph.frees):
        free = next(iter(graph.frees), "")
        trait = f"takes {free} of any size" if free else f"has the outputs {', '.join(graph.outputs)}"
        why = f"{trait}, and an engine has one output and inputs of fixed size"
    if not why:
        return
    known = [
        target.name
        for target in TARGETS.values()
        if target.runtime == "onnx" and target.precision in graph.precisions
    ]
    raise ConfigError(
        f"{source.ref} cannot be converted to {goal.name}: its function {graph.name} {why}; choose "
        f"{' or '.join(known)}",
        field="target",
    )


def _adapted(graph: base.Graph, folder: Path, source: Manifest) -> Graph:
    """A kind's graph as it is exported, calibrated and compared here."""
    module = graph.module.eval()
    example = _arrays(graph.example)

    def inputs(batch: int) -> Arrays:
        return {name: value[np.arange(batch) % len(value)] for name, value in example.items()}

    pictures = functools.cache(lambda: _pictures(graph, folder, source))

    def served(seed: int) -> list[Arrays]:
        real = pictures()
        if real is not None:
            chosen = np.random.default_rng(seed).choice(len(real), COUNT, replace=False)
            return [{next(iter(example)): real[chosen]}]
        return [_arrays(graph.others(seed))] if graph.others is not None else [inputs(COUNT)]

    return Graph(
        graph.name,
        module,
        graph.outputs,
        inputs,
        served,
        whole=module,
        frees=graph.frees,
        classes=graph.classes,
    )


def _pictures(graph: base.Graph, folder: Path, source: Manifest) -> np.ndarray | None:
    """Pictures of the data that the model was trained for, where they are here and its one input takes them."""
    function = source.signature.functions.get(graph.name)
    if function is None or len(function.inputs) != 1:
        return None
    ((name, spec),) = function.inputs.items()
    if len(spec.shape) != 3 or -1 in spec.shape or spec.dtype != "float32":
        return None
    real = real_pictures(folder, (spec.shape[0], spec.shape[1], spec.shape[2]))
    try:
        return None if real is None else spec.checked(name, real.pictures)
    except ConfigError:  # in another range
        return None


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}


BUILDERS: dict[str, Build] = {
    "denoiser": lambda folder, source, models, goal: load_graphs(folder, source, models),
    "field": lambda folder, source, models, goal: field_graphs(folder, goal),
}

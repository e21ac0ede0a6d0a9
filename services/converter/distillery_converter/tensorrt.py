"""The graphs of a model as TensorRT engines, each with the profile of its inputs; see `engine_building`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill_core.tensorrt import building as engine_building
from distill_core.tensorrt.engines import Profile, open_engine, this_host
from distillery_converter.calibration import Arrays
from distillery_converter.graph import EXAMPLE_BATCH, Graph

MAX_BATCH = 32  # largest batch of the optimisation profile
BEST_BATCH = 8  # the batch that kernels are chosen for


def tool_versions() -> dict[str, str]:
    """Versions that decide an engine's content beside the ONNX tools; see `this_host`."""
    return this_host().model_dump()


def build(
    sources: list[Path], graphs: list[Graph], folder: Path, *, target: str, cache: Path
) -> list[Callable[[Arrays], np.ndarray]]:
    """Build `<graph>.plan` for each ONNX file into `folder` with `engine.json`; the engines as functions.

    Raises:
        Unavailable: no GPU or no TensorRT here. ArtifactError: TensorRT refuses a graph; it says why.
    """
    host, profiles = this_host(), [profile_of(graph) for graph in graphs]
    engine_building.build(sources, profiles, folder, target=target, host=host, cache=cache)
    return [open_engine(folder, graph.name, host) for graph in graphs]


def profile_of(graph: Graph) -> Profile:
    """Batches 1 to `MAX_BATCH`, kernels chosen for `BEST_BATCH`; all other axes are fixed."""
    shapes = {name: array.shape[1:] for name, array in graph.inputs(EXAMPLE_BATCH).items()}
    return {name: ((1, *shape), (BEST_BATCH, *shape), (MAX_BATCH, *shape)) for name, shape in shapes.items()}

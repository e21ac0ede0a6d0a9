"""Denoiser graphs of a routed model, one for each part of its conditions. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill_core.diffusion.routing import PartitionSpec, class_parts, pooled, prompt_parts
from distill_core.errors import ArtifactError

Feed = dict[str, np.ndarray]
Graph = Callable[[Feed], np.ndarray]
EXPERT = "expert-{}"
_log = structlog.get_logger("distillery.sampler")


class Experts:
    """Graphs by part of a batch's items; that of a part, in `folder`, is opened when it is first asked for.

    Raises:
        ArtifactError: the default part's graph or the router is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        router: Path,
        ref: str,
        partition: PartitionSpec,
        open_graph: Callable[[Path], Graph],
        *,
        suffix: str,
    ) -> None:
        self._folder, self._open_graph, self._file = folder, open_graph, EXPERT + suffix
        self._ref, self._spec = ref, partition
        self._table = np.array(partition.table)
        self._router = _read_router(router) if partition.kind == "prompt" else {}
        self._graphs: dict[int, Graph] = {}
        self._lock = threading.Lock()
        self._graph(partition.default)

    def route(self, cond: Feed, batch: int) -> Graph:
        """The graphs of `batch` items as one; a feed may repeat the items, e.g. without condition."""
        parts = self._parts(cond, batch)
        return lambda feed: self._run(feed, np.tile(parts, len(feed["x_sigma"]) // batch))

    def _parts(self, cond: Feed, batch: int) -> np.ndarray:
        """The part (B,) of each item."""
        if not cond or self._spec.parts == 1:
            return np.full(batch, self._spec.default)
        if self._spec.kind == "class_label":
            by_class: np.ndarray = class_parts(cond["class_label"], self._table)
            return by_class
        by_prompt: np.ndarray = prompt_parts(pooled(cond["prompt_embeds"]), **self._router)
        return by_prompt

    def _run(self, feed: Feed, parts: np.ndarray) -> np.ndarray:
        """x0 (B, C, H, W) of each item by its own part's graph."""
        if (parts == parts[0]).all():
            return self._graph(int(parts[0]))(feed)
        x0 = np.empty_like(feed["x_sigma"])
        for part in np.unique(parts):
            own = parts == part
            x0[own] = self._graph(int(part))({name: value[own] for name, value in feed.items()})
        return x0

    def _graph(self, part: int) -> Graph:
        with self._lock:
            if part not in self._graphs:
                self._graphs[part] = self._open_graph(self._folder / self._file.format(part))
                if self._spec.parts > 1:
                    log_expert(self._ref, part)
            return self._graphs[part]


def log_expert(ref: str, part: int) -> None:
    """Say that the expert of a part takes memory from now on."""
    _log.info("expert loaded", model=ref, part=part)


def _read_router(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {error}; publish the model again") from None

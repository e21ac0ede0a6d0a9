"""Backends: what evaluates a model. They are called from several model threads and hold no request state."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from distill_core.errors import ArtifactError
from distill_core.signature import Signature, TensorSpec
from distillery_sampler.engine.requests import ImageItem, ImageKey, Rendered, Tile


class Generator(abc.ABC):
    """A denoiser that is sampled."""

    name: str
    on_gpu = False

    @abc.abstractmethod
    def generate(self, key: ImageKey, items: Sequence[ImageItem]) -> np.ndarray:
        """Pictures float32 (B, C, H, W) in [-1, 1]; picture i depends on `key` and `items[i]` alone."""

    def cuts(self, prompt: str) -> bool:
        """Whether the end of a prompt is left out, as it has more tokens than the model reads."""
        return False

    @abc.abstractmethod
    def held(self) -> dict[Hashable, int]:
        """Bytes of its weights by what holds them; weights that another backend shares have the same key."""


class SceneRenderer(abc.ABC):
    """A radiance field that is looked at."""

    name: str
    on_gpu = False

    @abc.abstractmethod
    def render(self, tiles: Sequence[Tile], *, normals: bool = False) -> list[Rendered]:
        """Tiles of any views; what a tile shows does not depend on those it is rendered with."""

    @abc.abstractmethod
    def held(self) -> dict[Hashable, int]:
        """As a generator's."""


class Functions(abc.ABC):
    """Functions of a signature, called by name."""

    name: str
    on_gpu = False

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def call(self, function: str, items: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Outputs of each item, without batch axis as the items; up to rounding they depend on that item alone.

        All items have the same inputs, of the same shapes.
        """
        outputs = self.run(function, {name: stacked([item[name] for item in items]) for name in items[0]})
        return [{name: values[row] for name, values in outputs.items()} for row in range(len(items))]

    def run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (B, …) of inputs (B, …), in the types of the signature.

        Raises:
            ArtifactError: the model answers with something else than its signature says.
        """
        size, made = len(next(iter(inputs.values()))), self._run(function, inputs)
        specs = self.signature.functions[function].outputs
        return {name: _described(name, made.get(name), spec, size) for name, spec in specs.items()}

    @abc.abstractmethod
    def _run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, in any type."""

    @abc.abstractmethod
    def held(self) -> dict[Hashable, int]:
        """As a generator's."""


Backend = Generator | SceneRenderer | Functions


def stacked(values: Sequence[np.ndarray]) -> np.ndarray:
    """Items as a batch; texts as an array of objects."""
    return np.array(values, dtype=object) if isinstance(values[0], str) else np.stack(values)


def _described(name: str, values: np.ndarray | None, spec: TensorSpec, size: int) -> np.ndarray:
    shape = None if values is None else values.shape
    if values is None or not shape or shape[0] != size or not spec.fits(shape[1:]):
        fault = "is not answered" if shape is None else f"has the shape {shape}"
        raise ArtifactError(
            f"output {name} {fault} for {size} items, its signature says {spec.described}; publish it again"
        )
    return values.astype(object if spec.dtype == "text" else spec.dtype, copy=False)

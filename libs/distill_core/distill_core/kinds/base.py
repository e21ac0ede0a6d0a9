"""Contract of a kind: how models that are alike are loaded, matched with data, measured, previewed and exported."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from distill_core.artifacts import Manifest
from distill_core.config import Config
from distill_core.data import Source
from distill_core.kinds import find_card, find_kind
from distill_core.probe import ImageProbe
from distill_core.recipe.tables import EvaluateConfig, ModelSource
from distill_core.signature import Signature

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


class Models(Protocol):
    """Source of further models for a kind: those that measure, and the bases of adapters."""

    def folder(self, source: ModelSource) -> Path:
        """The folder of the model that `source` names."""
        ...

    def artifact(self, ref: str, *, device: str = "cpu") -> Any:
        """The model of a store reference."""
        ...


@dataclass(frozen=True)
class Measured:
    """Figures, in words what they rest on (by figure, or `distances` for those that compare features), and charts."""

    figures: dict[str, float]
    rests_on: dict[str, str] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)  # by name, for the run folder


class Evaluator(Protocol):
    """Evaluator of models of one kind on one data source."""

    def measure(
        self, model: Any, references: Mapping[str, Any], should_stop: Callable[[], bool] = ...
    ) -> Measured:
        """Figures of `model`, and of the `references` (teacher, what it began as) by their names' prefix."""
        ...


@dataclass(frozen=True)
class Graph:
    """One function of a model as a converter exports it.

    `example` holds one batch of at least two inputs by name, in the order of the module's arguments; batches of other
    sizes are made by repeating it. `outputs` names what the module returns: a tensor, or a tuple of them. What of
    `module` is a floating point weight or input is lowered to the precisions that `precisions` allows.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    precisions: tuple[str, ...] = PRECISIONS  # that it may be exported in
    frees: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # axes of any size; the batch is axis 0
    others: Callable[[int], Mapping[str, Tensor]] | None = (
        None  # 16 further inputs by seed, also of other sizes
    )
    classes: str = ""  # the output whose largest entry along the last axis is the answer


class Kind(abc.ABC):
    """Base of the kinds: what is the same for all, and what each must say."""

    name: str
    needs_held_out = False  # True: figures on the data of the training would say little, and are not made

    @property
    def Card(self) -> type[Config]:
        """Facts that a manifest keeps of models of this kind."""
        card: type[Config] = find_card(self.name).Card
        return card

    @property
    def Evaluate(self) -> type[EvaluateConfig]:
        """The `[evaluate]` table of this kind."""
        table: type[EvaluateConfig] = find_card(self.name).Evaluate
        return table

    def signature(self, card: Config) -> Signature:
        """Functions that a server calls by name."""
        signature: Signature = find_card(self.name).signature(card)
        return signature

    def recognise(self, folder: Path) -> bool:
        """Whether `folder` holds a model of this kind, also one that no store has."""
        return False

    @abc.abstractmethod
    def load(self, folder: Path, *, device: str = "cpu", models: Models | None = None) -> Any:
        """The model in `folder`, frozen and in evaluation mode; `models` finds what it rests on.

        Raises:
            ArtifactError: damaged files, or a base that is not there.
        """

    def fit(self, model: Any, source: Source) -> None:  # noqa: B027  nothing is asked by default
        """Make the data give what the model is conditioned on.

        Raises:
            ConfigError, DataError: the sentence why data and model do not go together.
        """

    def evaluator(
        self, model: Any, source: Source, config: EvaluateConfig, models: Models
    ) -> Evaluator | None:
        """The evaluator of `model` on `source`; None if nothing can be measured.

        Raises:
            NotFound, ArtifactError: a model that measures is not there. ConfigError: it cannot measure this.
        """
        return None

    def as_saved(self, model: Any, folder: Path) -> Any:
        """The model as a server reads it from `folder`, where its weights may be of less precision."""
        return model

    def image_probe(self, model: Any) -> ImageProbe | None:
        """The model's picture of fixed inputs, in few numbers, for kinds that make pictures."""
        return None

    def probe(self, model: Any) -> Mapping[str, Mapping[str, np.ndarray]]:
        """`inputs.NAME` and `outputs.NAME` by function; those that are small are kept beside the weights."""
        return {}

    def preview(self, model: Any, source: Source, seed: int, references: Mapping[str, Any]) -> Tensor | None:
        """Pictures (B, C, H, W) in [-1, 1] that show what the model does; None if there is nothing to see."""
        return None

    def graphs(self, model: Any, manifest: Manifest) -> list[Graph]:
        """Graphs that a converter exports; [] for a kind without exports."""
        return []


def image_probe_of(model: Any) -> ImageProbe | None:
    """A model's picture of fixed inputs, in few numbers; None for what makes no pictures."""
    return find_kind(model.kind).image_probe(model)

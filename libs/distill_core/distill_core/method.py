"""The contract between a method and the training loop. A method yields losses; the loop does everything else."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from distill_core.config import Config as MethodConfig
from distill_core.recipe.tables import EvaluateConfig

# conditions by name, batch dimension first: class_label (B,), prompt_embeds (B, T, D)
Cond = dict[str, Tensor]

__all__ = ["Batch", "Cond", "Method", "MethodConfig", "Model", "Stage", "Update"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as the data source made it: columns by name, the batch first.

    `x0` (B, C, H, W) in [-1, 1] is the column of pictures, None where the data has none. `cond` is what a model is
    conditioned on: chosen from the columns, or made of the items' prompts.
    """

    index: Tensor  # (B,) stable ids of the items; where a method draws its own, their number is all they say
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # x0, class_label, low_res, target …
    cond: Cond = field(default_factory=dict)
    view: Mapping[str, Tensor] = field(default_factory=dict)  # how the items were augmented; replayable
    also: Mapping[str, Batch] = field(default_factory=dict)  # a batch of each further stream, by its name

    @classmethod
    def of(cls, size: int, x0: Tensor | None = None, cond: Cond | None = None) -> Batch:
        """A batch of `size` items numbered from 0."""
        columns = {} if x0 is None else {"x0": x0}
        return cls(torch.arange(size), columns, dict(cond or {}))

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def x0(self) -> Tensor | None:
        return self.columns.get("x0")

    def with_x0(self, x0: Tensor) -> Batch:
        """The same items with other pictures: latents, or augmented ones."""
        return replace(self, columns={**self.columns, "x0": x0})

    def to(self, device: torch.device) -> Batch:
        """The same batch with all its tensors on `device`."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

        also = {name: batch.to(device) for name, batch in self.also.items()}
        return Batch(self.index.to(device), moved(self.columns), moved(self.cond), moved(self.view), also)


@dataclass(frozen=True)
class Update:
    """One optimiser step asked for: minimise `loss` (a scalar) over the parameters of `role` alone.

    With `loss` None the method changed the role itself (a closed form, a search); the loop checks, averages and logs
    what it finds. A role of "" changes nothing that is trained and reports progress alone.
    """

    role: str
    loss: Tensor | None
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A part of a run: for how many steps, who is trained, and with which state of the optimisers."""

    name: str
    steps: int
    roles: tuple[str, ...]
    trains: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # role -> patterns of its parameters; all
    streams: tuple[str, ...] = ()  # further data sets that give a batch to each step
    restart: bool = False  # True: optimisers and learning-rate schedule begin anew


class Model(Protocol):
    """A model that a run publishes: it names its kind, writes its folder, and says what a manifest keeps of it."""

    kind: ClassVar[str]

    def save(self, folder: Path) -> None:
        """Write the model's folder."""
        ...

    def card(self) -> Any:
        """Facts of its kind, an instance of the kind's `Card`."""
        ...


def _annotated_config(cls: type) -> Any:
    """The class that `cls` itself annotates `config` with, in its body or in its constructor; None for neither."""
    constructor = vars(cls).get("__init__")
    hints = {**getattr(constructor, "__annotations__", {}), **vars(cls).get("__annotations__", {})}
    config = types.SimpleNamespace(__annotations__={name: hints[name] for name in hints.keys() & {"config"}})
    return typing.get_type_hints(config, globalns=vars(sys.modules[cls.__module__])).get("config")


class Method(nn.Module):
    """Base of all methods. A subclass is found by its file's name in `methods/<family>/`, nothing registers it.

    The keyword names of the constructor say what it needs; the builder passes these and no others:
    `teacher` (frozen model), `student` (a trainable copy of the teacher, or what the recipe's `[student]` says),
    `network` (the recipe's `[network]` table), `data` (the source), `pairs` (noise and the teacher's pictures of it,
    by `[pairs]`; None without that table), `extractor` (a frozen network that a loss or a reward reads pictures with;
    None without its table), `seed`, `steps` and `batch_size` of the run, and by its own name each of
    `[teachers.NAME]` and `[data.NAME]`.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig  # what the constructor's `config` is annotated with
    paper: ClassVar[str] = ""  # "Authors, year, title, arXiv id"
    kind: ClassVar[str] = "denoiser"  # of the result
    # attributes that are trained: an optimiser, a checkpoint entry each; a constructor may name more of them
    roles: tuple[str, ...] = ()
    held: ClassVar[
        tuple[str, ...]
    ] = ()  # attributes that change untrained (targets, snapshots): checkpointed too
    result: ClassVar[str] = "student"  # the role that is evaluated and published
    # how its memory is planned: a step on fake tensors, a real step (scenes: small, and their steps depend on values)
    plan: ClassVar[Literal["fake", "step", "none"]] = "fake"

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "Config" not in vars(cls):
            cls.Config = _annotated_config(cls) or cls.Config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Put roles and held modules into training mode, or all into evaluation mode: what is frozen stays there."""
        super().train(mode)
        for name, child in self.named_children():
            if name not in (*self.roles, *self.held):
                child.eval()
        return self

    @classmethod
    def columns(cls, config: Any) -> Mapping[str, str]:
        """Columns that `config` needs of the data, and what for, in a few words: `{"x0": "the discriminator"}`."""
        return {}

    @classmethod
    def stages(cls, config: Any, steps: int) -> tuple[Stage, ...]:
        """Parts of a run of `steps` steps, in order; the last takes all steps that are left."""
        return (Stage("train", steps, cls.roles),)

    def stage_of(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        stages = self.stages(getattr(self, "config", None), step + 1)
        start = 0
        for stage in stages[:-1]:
            start += stage.steps
            if step < start:
                return stage
        return stages[-1]

    def enter(self, stage: Stage, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Begin a later stage than the first; runs once, seeded by (seed, stage), before its first step.

        When a run is resumed inside the stage, `shapes` of its checkpoint's tensors are given and modules may be
        built, but not trained: their tensors are loaded next.
        """

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        """Yield updates in order; the loop steps each role before it asks for the next.

        Runs once per micro-batch, all of them in lock step. Randomness comes from torch's global generator, which
        the loop seeds from (seed, step, rank, micro-batch); a method keeps no counters of its own.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Tensors beside roles and held modules that a resumed run needs (most methods have none)."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def published(self) -> Mapping[str, Model]:
        """Models that the run leaves, by role; the first is the main one, others are published as NAME-ROLE.

        The loop has put the EMA weights in place.
        """
        return {self.result: getattr(self, self.result)}

    @property
    def main(self) -> Model:
        """The main one of the published models."""
        return next(iter(self.published().values()))

    def references(self) -> Mapping[str, Any]:
        """Models that the result is compared with: its teacher, and where it is known, what it began as."""
        teacher = getattr(self, "teacher", None)
        return {} if teacher is None else {"teacher": teacher}

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """The method's own figures beside those that its result's kind measures."""
        return {}

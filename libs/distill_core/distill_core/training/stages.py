"""Stages of a run, laid out on its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from distill_core.errors import ConfigError, nearest
from distill_core.method import Method, Stage
from distill_core.recipe.tables import OptimConfig, StageConfig


@dataclass(frozen=True)
class Placed:
    """A stage at its place: from step `start` up to, and without, `stop`."""

    index: int
    stage: Stage
    start: int
    stop: int


def place_stages(stages: Sequence[Stage], steps: int) -> tuple[Placed, ...]:
    """The stages of a run of `steps` steps; the last takes all steps that are left.

    Raises:
        ConfigError: no stage, two of one name, one without steps, or none left for the last.
    """
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) < len(names):
        raise ConfigError(
            f"a run needs stages of different names, and these are {', '.join(names) or 'none'}"
        )
    placed, start = [], 0
    for index, stage in enumerate(stages):
        last = index == len(stages) - 1
        if stage.steps < 1:
            raise ConfigError(f"stage {stage.name} has {stage.steps} steps; at least 1 is allowed")
        stop = steps if last else min(start + stage.steps, steps)
        if start < steps:
            placed.append(Placed(index, stage, start, stop))
        start = stop
    return tuple(placed)


def stage_at(placed: Sequence[Placed], step: int) -> Placed:
    """The stage that `step` belongs to; after the last step still the last stage."""
    return next((one for one in placed if one.start <= step < one.stop), placed[-1])


def check_tables(placed: Sequence[Placed], tables: Mapping[str, object]) -> None:
    """Refuse `[stages.NAME]` tables of stages that the method does not have."""
    names = [one.stage.name for one in placed]
    for name in tables:
        if name not in names:
            raise ConfigError(f"unknown stage stages.{name}{nearest(name, names)}", field=f"stages.{name}")


def stage_optim(tables: Mapping[str, StageConfig], placed: Placed) -> dict[str, OptimConfig]:
    """The optimisers of `[stages.NAME.optim]`, by role; {} without such a table."""
    table = tables.get(placed.stage.name)
    return {} if table is None else table.optim


def begins_optimizers_anew(tables: Mapping[str, StageConfig], before: Placed, placed: Placed) -> bool:
    """Whether `placed` has other optimisers than the stage `before` it: new ones, or those of its own table."""
    return placed.stage.restart or any(stage_optim(tables, one) for one in (before, placed))


def check_sharded(placed: Sequence[Placed], tables: Mapping[str, StageConfig]) -> None:
    """Refuse sharding of a run in which a later stage begins with other optimisers."""
    for before, one in pairwise(placed):
        if begins_optimizers_anew(tables, before, one):
            raise not_sharded(one)


def not_sharded(placed: Placed) -> ConfigError:
    """The sentence for a stage before which the networks would have to be sharded once more."""
    return ConfigError(
        f"sharding cannot follow stage {placed.stage.name}, which begins with other networks or optimisers; "
        "leave sharding out",
        field="sharding",
    )


def select_parameters(method: Method, stage: Stage) -> None:
    """Give gradients to the parameters that `stage.trains` names, of the roles that it lists; others of these rest."""
    for role, patterns in stage.trains.items():
        module: nn.Module = getattr(method, role)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))

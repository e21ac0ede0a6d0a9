"""Diffusers' schedulers as tables of steps. NumPy only."""

from __future__ import annotations

from dataclasses import replace

from distill_core.diffusion import steps as plain
from distill_core.diffusion.schedulers import discrete, solvers
from distill_core.diffusion.schedulers.levels import Levels, Size, levels_of
from distill_core.diffusion.schedulers.spec import DISCRETE, SchedulerSpec
from distill_core.diffusion.steps import Path, Step

__all__ = ["SchedulerSpec", "levels", "most_steps", "path"]
MOST_STEPS = 1000


def levels(spec: SchedulerSpec, num_steps: int, size: Size) -> Levels:
    """The levels that `num_steps` steps visit for an x of `size` (height, width).

    Raises:
        ConfigError: a number of steps that the scheduler has no levels for.
    """
    return (
        discrete.discrete_levels(spec, num_steps)
        if spec.name in DISCRETE
        else levels_of(spec, num_steps, size)
    )


def most_steps(spec: SchedulerSpec) -> int:
    """The largest number of steps that there can be levels for."""
    if spec.name in ("lcm", "tcd"):
        return len(spec.timesteps) or spec.original_inference_steps
    return min(spec.num_train_timesteps, MOST_STEPS)


def path(spec: SchedulerSpec, num_steps: int, size: Size, first: int = 0) -> Path:
    """The steps from the level `first` on.

    Raises:
        ConfigError: as `levels` does.
    """
    found = levels(spec, num_steps, size)
    steps = _steps(spec, replace(found, visited=found.visited[first:]), num_steps)
    return Path(found.start, _ended(steps, found.end))


def _steps(spec: SchedulerSpec, found: Levels, num_steps: int) -> list[Step]:
    visited = found.visited
    if spec.name == "ddim":
        return discrete.ddim(spec, visited, num_steps)
    if spec.name == "dpmpp_2m":
        return solvers.dpmpp_2m(spec, visited, found.last, num_steps)
    if spec.name in ("lcm", "tcd"):
        return (discrete.lcm if spec.name == "lcm" else discrete.tcd)(spec, visited)
    if spec.name == "scm" or (spec.name == "flow_euler" and spec.stochastic):
        return plain.renoised(visited)
    if spec.name in ("euler", "flow_euler"):
        return plain.euler(visited, found.last)
    return {"euler_ancestral": solvers.ancestral, "heun": solvers.heun, "unipc": solvers.unipc}[spec.name](
        visited
    )


def _ended(steps: list[Step], end: float) -> list[Step]:
    """The steps, the last one's result times `end`."""
    if end == 1:
        return steps
    a, b, c, d = steps[-1].state
    return [*steps[:-1], replace(steps[-1], state=(a * end, b * end, c * end, d * end))]

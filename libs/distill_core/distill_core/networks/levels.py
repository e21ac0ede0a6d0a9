"""The noise levels of a few-step student, which belong to its teacher's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel

from distill_core.diffusion.grids import LevelGrid
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ConfigError
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import real_tensors

OF_SCHEDULE = (
    "of the teacher's schedule"  # marks a config key: its value means nothing under another schedule
)
Levels = Annotated[tuple[float, ...], OF_SCHEDULE]  # noise levels, data std, descending
Level = Annotated[float | None, OF_SCHEDULE]


def keys_of_schedule(config: type[BaseModel]) -> list[str]:
    """The keys of a method's config that hold noise levels of its teacher."""
    return [name for name, field in config.model_fields.items() if OF_SCHEDULE in field.metadata]


def descending(levels: tuple[float, ...]) -> tuple[float, ...]:
    """`levels` as they are. Raises ValueError if they are not positive and strictly descending."""
    if list(levels) != sorted(set(levels), reverse=True) or any(level <= 0 for level in levels):
        raise ValueError("levels must be positive and strictly descending, e.g. [5.0, 1.0]")
    return levels


@real_tensors()
def student_levels(
    teacher: Denoiser,
    given: Sequence[float] = (),
    *,
    count: int = 1,
    field: str = "config.levels",
    whose: str = "teacher",
) -> tuple[float, ...]:
    """The levels of a student: those given, or `count` from the teacher's own start on.

    A teacher of discrete timesteps was trained at their levels alone: the nearest one of each is taken, and plain
    diffusers, whose few-step schedulers know integers only, can sample there too.

    Raises:
        ConfigError: a level above the teacher's highest, or two that fall on one timestep.
    """
    schedule = teacher.schedule
    if not given:
        return schedule.spread(teacher.sampler.start, count)
    if max(given) > schedule.sigma_max * (1 + 1e-6):
        raise ConfigError(
            f"level {max(given):g} is above the {whose}'s highest, {schedule.sigma_max:g}", field=field
        )
    levels = tuple(schedule.nearest(level) for level in given)
    if len(set(levels)) < len(levels):
        raise ConfigError(
            f"levels {list(given)} fall on {len(set(levels))} of the {whose}'s timesteps; set them further apart",
            field=field,
        )
    return levels


def level_grid(teacher: Denoiser, count: int, *, start: float | None = None) -> LevelGrid:
    """`count` intervals from `start`, or the teacher's own start, down to 0, evenly on the teacher's schedule.

    Raises:
        ConfigError: a start above the teacher's highest level, or more intervals than it has timesteps.
    """
    if start is None:
        start = teacher.sampler.start
    else:
        (start,) = student_levels(teacher, (start,), field="config.start")
    with real_tensors():
        levels = teacher.schedule.spread(start, count)
    if len(set(levels)) < count:
        raise ConfigError(
            f"{count} levels fall on {len(set(levels))} of the teacher's timesteps; ask for fewer",
            field="config",
        )
    return LevelGrid((*levels, 0.0))


def few_step_sampler(
    student: Denoiser, levels: tuple[float, ...], step_counts: tuple[int, ...] = (), *, eta: float = 1.0
) -> SamplerSpec:
    """The sampler of `student`, distilled at `levels`; `eta` is its share of fresh noise from step to step."""
    scale: Any = student.schedule.start_scale(levels[0])
    spec = SamplerSpec.few_step(levels, noise_scale=scale, step_counts=step_counts)
    return spec if eta == 1 else spec.model_copy(update={"eta": eta})

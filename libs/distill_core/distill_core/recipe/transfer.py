"""A recipe written for one teacher, applied to another: what belongs to the former teacher's schedule is said anew.

Noise levels mean something under one schedule only, and learning rates were found with it. Under the same schedule
both stay. Under another, levels that nobody gave become as many of the new teacher's own, from its start on; learning
rates become the library's default; and each of them is logged. Data stay if both teachers were made from the same.
"""

from __future__ import annotations

import contextlib
import logging
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from distill_core.errors import ConfigError, DistilleryError
from distill_core.methods import find_method
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import fake_tensors, is_faked, real_tensors
from distill_core.networks.levels import keys_of_schedule, student_levels
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.tables import ModelSource, OptimConfig

log = logging.getLogger(__name__)
Former = Callable[[Recipe], nn.Module]  # what a recipe trains, untrained


class Models(Protocol):
    """Source of models."""

    def folder(self, source: ModelSource) -> Path: ...

    def load(self, source: ModelSource) -> nn.Module: ...


def suited(recipe: Recipe, models: Models, former: Former) -> Recipe:
    """`recipe` for the teacher that it names; itself if it was written for that one.

    Raises:
        ConfigError: the data are the former teacher's, and this one was made from others.
    """
    if recipe.replaced is None or recipe.teacher is None or recipe.teacher.scene is not None:
        return recipe
    given, folder = recipe.replaced.given, models.folder(recipe.teacher)
    whole = any((folder / slot).is_dir() for slot in ("unet", "transformer"))
    with (
        _shapes_alone() if whole else contextlib.nullcontext()
    ):  # only diffusers' folders load without weights
        teacher = models.load(recipe.teacher.model_copy(update={"adapters": None}))  # they change no schedule
    if not isinstance(teacher, Denoiser):
        return recipe
    if not any(key == "data" or key.startswith("data.") for key in given):
        _check_data(recipe, folder)
    values = recipe.model_dump(mode="json", exclude_none=True)
    del values["replaced"]
    if not _same_schedule(teacher, recipe.replaced.recipe, former):
        changes = [*_own_levels(values, teacher, recipe, given), *_default_rates(values, recipe, given)]
        if changes:
            log.warning(
                "the recipe was written for the teacher of %s, whose schedule is another than this one's (%s): %s",
                recipe.replaced.recipe,
                teacher.schedule,
                ", ".join(changes),
            )
    return Recipe.parse(values)


def _shapes_alone() -> contextlib.AbstractContextManager[None]:
    """Context in which models have no weights: only their schedules are looked at."""
    return contextlib.nullcontext() if is_faked() else fake_tensors()


def _same_schedule(teacher: Denoiser, name: str, former: Former) -> bool:
    try:
        with _shapes_alone():
            before = former(load_recipe(name))
    except DistilleryError:  # a recipe of the user's own, which is gone
        return False
    if not isinstance(before, Denoiser):
        return False
    with real_tensors():
        same = teacher.schedule.same_as(before.schedule)
    return same and abs(teacher.sampler.start / before.sampler.start - 1) < 1e-4


def _own_levels(
    values: dict[str, Any], teacher: Denoiser, recipe: Recipe, given: tuple[str, ...]
) -> list[str]:
    """Replace levels that nobody gave by the teacher's own; what was done, in words."""
    changes = []
    for key in keys_of_schedule(find_method(recipe.method).Config):
        before = recipe.config.get(key)
        if not before or any(_covers(one, f"config.{key}") for one in given):
            continue
        count = len(before) if isinstance(before, (list, tuple)) else 1
        levels = [float(level) for level in student_levels(teacher, count=count)]
        values["config"][key] = levels if isinstance(before, (list, tuple)) else levels[0]
        changes.append(f"config.{key} = {before} becomes {values['config'][key]}")
    return changes


def _default_rates(values: dict[str, Any], recipe: Recipe, given: tuple[str, ...]) -> list[str]:
    changes = []
    default = OptimConfig().lr
    for role, before in recipe.optim.items():
        if before.lr != default and not any(_covers(one, f"optim.{role}.lr") for one in given):
            values["optim"][role]["lr"] = default
            changes.append(f"optim.{role}.lr = {before.lr:g} becomes {default:g}")
    return changes


def _covers(key: str, target: str) -> bool:
    """Whether setting `key` sets `wanted`: it is that key, or a table around it."""
    return target == key or target.startswith(f"{key}.")


def _check_data(recipe: Recipe, folder: Path) -> None:
    """Refuse the former teacher's data where the new one's folder says that it learnt from others."""
    assert recipe.replaced is not None
    ours = _named(recipe.data)
    try:
        before = _named(load_recipe(recipe.replaced.recipe).data)
        kept = next(
            path for path in (folder / "recipe.toml", folder.parent / "recipe.toml") if path.is_file()
        )
        now = _named(tomllib.loads(kept.read_text(encoding="utf-8")).get("data"))
    except (DistilleryError, StopIteration, OSError, ValueError):  # nothing is known of one of them
        return
    if ours is not None and now is not None and ours == before != now:
        raise ConfigError(
            f"data.name = {ours[0]!r} is what the recipe's former teacher was trained on, and this one "
            f"was on {now[1] or now[0]}; give data for it, e.g. data.name = {now[0]!r}",
            field="data.name",
        )


def _named(data: Any) -> tuple[Any, Any] | None:
    """The data's source and path."""
    return (data.get("name"), data.get("path")) if isinstance(data, dict) else None

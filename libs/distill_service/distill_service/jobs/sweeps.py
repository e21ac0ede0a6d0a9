"""Sweeps: one training job for each combination of some keys' values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill_core.errors import ConfigError, DistilleryError
from distill_core.recipe import parse_overrides
from distill_service.jobs.specs import Draft, draft_train

MAX_AXES = 8
MAX_JOBS = 256
_MAX_VALUES = 64  # shown characters of the values in a job's name


def draft_sweep(
    axes: Sequence[tuple[str, Sequence[str]]],
    *,
    toml: str | None = None,
    name: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> list[Draft]:
    """The jobs of a sweep, the last key's values changing fastest. Values and overrides are TOML.

    Raises:
        ConfigError: no key or too many, a key or value twice, too many jobs, or a recipe that is wrong with them.
    """
    _check(axes, overrides or {})
    keys = [key for key, _ in axes]
    return [
        _draft(dict(zip(keys, values, strict=True)), toml, name, overrides or {})
        for values in itertools.product(*(values for _, values in axes))
    ]


def _check(axes: Sequence[tuple[str, Sequence[str]]], overrides: Mapping[str, str]) -> None:
    if not 1 <= len(axes) <= MAX_AXES:
        raise ConfigError(f"a sweep has 1 to {MAX_AXES} keys, not {len(axes)}", field="sweep.axes")
    seen = set(overrides)
    for key, values in axes:
        if key in seen:
            raise ConfigError(f"key {key[:64]!r} is given twice", field="sweep.axes")
        if not values or len(set(values)) != len(values):
            message = f"key {key[:64]!r} of a sweep needs one value or more, each of them once"
            raise ConfigError(message, field="sweep.axes")
        seen.add(key)
    count = math.prod(len(values) for _, values in axes)
    if count > MAX_JOBS:
        raise ConfigError(f"a sweep has at most {MAX_JOBS} jobs, this one {count}", field="sweep.axes")


def _draft(
    point: Mapping[str, str], toml: str | None, name: str | None, overrides: Mapping[str, str]
) -> Draft:
    changes = parse_overrides(f"{key}={value}" for key, value in {**overrides, **point}.items())
    shown = " ".join(f"{key.rsplit('.', 1)[-1]}={value[:_MAX_VALUES]}" for key, value in point.items())
    try:
        draft = draft_train(toml=toml, name=name, overrides=changes)
    except DistilleryError as error:
        placed = type(error)(f"{error} (in the sweep's job {shown})")
        placed.field = error.field
        raise placed from None
    return replace(draft, name=f"{draft.name} {shown}", labels=point)

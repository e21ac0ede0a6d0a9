"""A pipeline as a TOML file: stages that name a recipe, a conversion or an evaluation, and each other.

[[stages]]
name = "teacher"
recipe = "edm_digits"                       # a recipe's name, or a .toml file beside this one
[[stages]]
name = "student"
recipe = "dmd2"
set.teacher.artifact = "{teacher}"          # what the stage `teacher` publishes
[[stages]]
name = "onnx"
convert = "{student}"
target = "onnx-fp32"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from distill_core.config import Config, Name
from distill_core.errors import ConfigError, NotFound
from distill_core.files.text import read_text

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import PipelineSpec, StageSpec


class StageFile(Config):
    """One stage: exactly one of `recipe`, `convert` and `evaluate`."""

    name: Name
    after: tuple[Name, ...] = ()  # stages it waits for without using what they publish
    recipe: str | None = None
    set: dict[str, Any] = {}  # overrides of the recipe's keys; tables may be nested
    convert: str | None = None  # name@version, name@alias or "{stage}"
    target: str = "onnx-fp32"
    tolerance: float | None = None
    evaluate: str | None = None  # as convert
    settings: dict[str, Any] | None = None  # of an evaluation, as a recipe's [evaluate] table
    data: dict[str, Any] | None = None  # of an evaluation, as a recipe's [data] table

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(value is not None for value in (self.recipe, self.convert, self.evaluate)) != 1:
            raise ValueError("give exactly one of recipe, convert, evaluate")
        return self


class PipelineFile(Config):
    """A pipeline and its stages, each of which refers to earlier ones only."""

    name: str = ""
    stages: tuple[StageFile, ...] = Field(min_length=1, max_length=64)


def read_pipeline(path: Path) -> PipelineFile:
    """The pipeline in a TOML file.

    Raises:
        NotFound: no such file. ConfigError: not TOML, an unknown key, or a stage of no or two kinds.
    """
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise NotFound(f"pipeline file {path} cannot be read: {error.strerror}", field="pipeline") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"pipeline {path} is not valid TOML: {error}", field="pipeline") from None
    if "method" in values and "stages" not in values:
        raise ConfigError(
            f"{path} is a recipe, not a pipeline; queue it with: distillery submit {path}", field="pipeline"
        )
    return PipelineFile.parse(values)


def pipeline_message(pipeline: PipelineFile, folder: Path) -> PipelineSpec:
    """The message that submits it; recipe files are looked up in `folder`."""
    from distillery_trainer.client import pipeline_spec

    return pipeline_spec(*(_stage(stage, folder) for stage in pipeline.stages))


def _stage(entry: StageFile, folder: Path) -> StageSpec:
    from distillery_trainer.client import convert_spec, evaluate_spec, stage, train_spec

    if entry.recipe is not None:
        recipe = folder / entry.recipe if entry.recipe.endswith(".toml") else entry.recipe
        return stage(entry.name, train_spec(recipe, flattened(entry.set)), after=entry.after)
    if entry.convert is not None:
        return stage(
            entry.name, convert_spec(entry.convert, entry.target, entry.tolerance), after=entry.after
        )
    work = evaluate_spec(entry.evaluate or "", entry.settings, entry.data)
    return stage(entry.name, work, after=entry.after)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat

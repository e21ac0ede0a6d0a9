"""Specifications of jobs: validated before it is queued, without loading any model code."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from distill_core.config import NAME_PATTERN, Config, check_name
from distill_core.errors import ConfigError, DistilleryError, nearest
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.published_models import check_teacher_named
from distill_core.recipe.tables import EvaluateConfig
from distill_service.jobs.table import Kind

MAX_SPEC_BYTES = 256 * 1024
MAX_STAGES = 64
_REFERENCE = re.compile(r"^\{(.*)\}$")  # "{student}": what the stage `student` published


class ConvertSpec(Config):
    """A conversion of a published model."""

    artifact: str = Field(min_length=1, max_length=200)
    target: str = Field(pattern=NAME_PATTERN)  # onnx-fp32, trt-fp16, …
    tolerance: float | None = Field(None, gt=0)  # largest difference from PyTorch; unset: the target's own


class EvaluateSpec(Config):
    """An evaluation of a published model."""

    artifact: str = Field(min_length=1, max_length=200)
    evaluate: dict[str, Any] = {}  # the kind of the model says which keys; see `kinds/*/card.py`
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Draft:
    """A validated job that is not in the table yet. `stage` and `after` matter in a pipeline only."""

    kind: Kind
    spec: dict[str, Any]
    name: str
    stage: str = ""
    after: tuple[str, ...] = ()  # stages it waits for, beside those its spec refers to
    publishes: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)  # its own, beside those of the request

    def parents(self) -> list[str]:
        """Names of the stages that must have succeeded before this one starts."""
        return sorted({*self.after, *references(self.spec)})


def draft_train(
    *, toml: str | None = None, name: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Draft:
    """A training job from a recipe's TOML text or its name.

    Raises:
        ConfigError: the recipe is wrong, or lacks a teacher of the user's; `field` is its key. NotFound: no recipe
            has that name.
    """
    if (toml is None) == (name is None):
        raise ConfigError("give either recipe_toml or recipe_name", field="recipe")
    recipe = load_recipe(_values(toml), overrides) if toml is not None else _named(name or "", overrides)
    check_teacher_named(recipe)
    try:
        spec = {"recipe": recipe.model_dump(mode="json", exclude_none=True)}
    except ValueError:
        raise ConfigError("the recipe is nested too deeply", field="recipe") from None
    title = recipe.publish.name if recipe.publish else name or recipe.method
    return Draft(Kind.TRAIN, _limited(spec), title, publishes=recipe.publish is not None)


def _values(toml: str) -> dict[str, Any]:
    if len(toml.encode()) > MAX_SPEC_BYTES:
        raise ConfigError(f"the recipe is larger than {MAX_SPEC_BYTES // 1024} KiB", field="recipe")
    try:
        return tomllib.loads(toml)
    except ValueError as error:  # also a number of thousands of digits
        raise ConfigError(f"the recipe is not valid TOML: {error}", field="recipe") from None


def _named(name: str, overrides: Mapping[str, Any] | None) -> Recipe:
    check_name(name, what="recipe", field="recipe")
    if name.endswith(".toml"):  # a path would be read from the server's disk, not the caller's
        raise ConfigError(f"{name} is a file: send its text as recipe_toml", field="recipe")
    return load_recipe(name, overrides)


def draft_convert(values: Mapping[str, Any]) -> Draft:
    """A conversion job."""
    spec = ConvertSpec.parse(values)
    _check_artifact(spec.artifact)
    return Draft(Kind.CONVERT, spec.model_dump(mode="json"), f"{spec.artifact} to {spec.target}")


def draft_evaluate(values: Mapping[str, Any]) -> Draft:
    """An evaluation job."""
    spec = EvaluateSpec.parse(values)
    common = {key: value for key, value in spec.evaluate.items() if key in EvaluateConfig.model_fields}
    EvaluateConfig.parse(common, where="evaluate")  # what all kinds have; the job itself checks the rest
    _check_artifact(spec.artifact)
    dump = _limited(spec.model_dump(mode="json", exclude_none=True))
    return Draft(Kind.EVALUATE, dump, f"evaluate {spec.artifact}", publishes=False)


def _check_artifact(ref: str) -> None:
    if not _REFERENCE.match(ref):
        check_name(ref.partition("@")[0], what="model", field="artifact")


def _limited(spec: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(spec)) > MAX_SPEC_BYTES:
        raise ConfigError(
            f"the job's specification is larger than {MAX_SPEC_BYTES // 1024} KiB", field="recipe"
        )
    return spec


def check_single(draft: Draft) -> Draft:
    """A job outside a pipeline refers to no stage."""
    stages = references(draft.spec)
    if stages:
        raise ConfigError(
            f"artifact '{{{stages[0]}}}' refers to a stage, which only a pipeline has; give name@version",
            field="artifact",
        )
    return draft


def check_pipeline(stages: Sequence[Draft]) -> Sequence[Draft]:
    """Stages in an order in which each refers to earlier ones only.

    Raises:
        ConfigError: none or too many, a name twice, an unknown stage, or one that publishes nothing.
    """
    if not 1 <= len(stages) <= MAX_STAGES:
        raise ConfigError(
            f"a pipeline has 1 to {MAX_STAGES} stages, not {len(stages)}", field="pipeline.stages"
        )
    earlier: dict[str, Draft] = {}
    for draft in stages:
        where = f"pipeline.stages[{len(earlier)}]"
        check_name(draft.stage, what="stage", field=f"{where}.name")
        if draft.stage in earlier:
            raise ConfigError(f"two stages are called {draft.stage!r}", field=f"{where}.name")
        for parent in draft.parents():
            _check_parent(draft, parent, earlier, where)
        earlier[draft.stage] = draft
    return stages


def _check_parent(draft: Draft, parent: str, earlier: Mapping[str, Draft], where: str) -> None:
    if parent not in earlier:
        hint = nearest(parent, earlier) or "; it is the first stage"
        raise ConfigError(
            f"stage {draft.stage} refers to {parent!r}, which is no earlier stage{hint}", field=where
        )
    if parent in references(draft.spec) and not earlier[parent].publishes:
        raise ConfigError(
            f"stage {draft.stage} uses what stage {parent} publishes, but that publishes nothing; "
            "give its recipe a [publish] table",
            field=where,
        )


def references(spec: Mapping[str, Any]) -> list[str]:
    """Stages whose results a specification names as `artifact = "{stage}"`."""
    stages = []
    for key, value in spec.items():
        if isinstance(value, Mapping):
            stages += references(value)
        elif key == "artifact" and isinstance(value, str) and (match := _REFERENCE.match(value)):
            stages.append(match[1])
    return stages


def substitute(spec: Mapping[str, Any], artifacts: Mapping[str, str]) -> dict[str, Any]:
    """The specification with each `artifact = "{stage}"` replaced by what that stage published."""
    result = dict(spec)
    for key, value in spec.items():
        if isinstance(value, Mapping):
            result[key] = substitute(value, artifacts)
        elif key == "artifact" and isinstance(value, str) and (match := _REFERENCE.match(value)):
            if not artifacts.get(match[1]):
                raise ConfigError(f"stage {match[1]} published no artifact", field="artifact")
            result[key] = artifacts[match[1]]
    return result


def within(stage: str, error: DistilleryError) -> DistilleryError:
    """The same error, saying in which stage of a pipeline it is."""
    placed = type(error)(f"stage {stage}: {error}")
    placed.field = f"pipeline.stages.{stage}.{error.field}" if error.field else f"pipeline.stages.{stage}"
    return placed

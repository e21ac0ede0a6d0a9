"""The reference: current, complete, and found by whatever a person types."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import pytest
from pydantic import Field

from distill_core.config import Config
from distill_core.errors import NotFound
from distill_core.recipe import load_recipe
from distill_core.reference import figures, words
from distill_core.reference.tables import tables
from distillery_cli.reference import found, pages, whole_reference
from tests.helpers import REPOSITORY

PAGES = REPOSITORY / "docs/reference"


@pytest.fixture(scope="module")
def chapters():
    return whole_reference()


def test_the_pages_are_current(chapters):
    kept = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert kept == pages(chapters), "run: distillery reference --write docs/reference"


def test_every_key_says_what_it_means(chapters):
    silent = [
        f"{one.path}.{key.name}"
        for part in chapters.values()
        for one in part
        for key in one.keys
        if not key.meaning
    ]
    assert silent == []  # a comment beside the field says it; else reference/words.toml


def test_words_are_of_keys_that_exist(chapters):
    keys = {(one.path, key.name) for part in chapters.values() for one in part for key in one.keys}
    paths, names = {path for path, _ in keys}, {name for _, name in keys}
    for place, entries in words().items():
        if place.startswith("figure"):
            continue
        for name in entries:
            assert name in names, (place, name)
            assert place not in paths or (place, name) in keys, (place, name)


def test_every_measured_figure_is_explained():
    known = {key.name for key in figures().keys}
    prefixes = [name.removesuffix("…") for name in known if name.endswith("…")]
    evidence = json.loads((REPOSITORY / "docs/evidence.json").read_text(encoding="utf-8"))
    measured = {(recipe, name) for recipe in evidence for name in evidence[recipe].get("figures", {})}
    assert len(measured) > 50
    for recipe, name in measured:
        bases = [name.removeprefix(prefix) for prefix in ("", *prefixes) if name.startswith(prefix)]
        assert {general(base, load_recipe(recipe).evaluate) for base in bases} & known, name


def general(figure: str, table: dict[str, Any]) -> str:
    """The figure's name in the reference, where a recipe's `[evaluate]` names what is measured apart."""
    column, groups = table.get("by"), {**table.get("groups", {}), **table.get("ranges", {})}
    if figure.removesuffix("_accuracy") in groups:
        return "GROUP_accuracy"
    at_value = column and re.fullmatch(rf"{re.escape(column)}_[-+.e\d]+_accuracy", figure)
    return "COLUMN_VALUE_accuracy" if at_value else figure


@pytest.mark.parametrize(
    ("path", "table", "key"),
    [
        ("data.images", "data.images", "captions"),
        ("data.huggingface.prompt_column", "data.huggingface", "prompt_column"),
        ("data.captions", "data.images", "captions"),
        ("config.critic_steps", "config.dmd2", "critic_steps"),
        ("optim.student.lr", "optim.ROLE", "lr"),
        ("lr", "optim.ROLE", "lr"),
        ("steps", "", "steps"),
        ("stages.joint.optim.student.lr", "stages.STAGE.optim.ROLE", "lr"),
        ("evaluate.judge.artifact", "evaluate.denoiser.judge", "artifact"),
        ("config.pvd.poses.kind", "config.pvd.poses", "kind"),
        ("network.levels", "network.hash", "levels"),
        ("DISTILLERY_SAMPLER_MAX_MEMORY", "settings.sampler", "DISTILLERY_SAMPLER_MAX_MEMORY"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "settings", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ("settings", "settings", "DISTILLERY_STORE_URL"),
        ("teacher_one_step_accuracy", "figures", "accuracy"),
        ("figures", "figures", "frechet_distance"),
        ("data-sources", "data.idx", "value_range"),
    ],
)
def test_what_a_person_types_is_found(chapters, path, table, key):
    assert (table, key) in {(one.path, entry.name) for one in found(path, chapters) for entry in one.keys}


def test_a_key_alone_is_shown_without_the_others(chapters):
    (one,) = found("data.images.size", chapters)
    assert [(key.name, key.kind, key.default, key.allowed) for key in one.keys] == [
        ("size", "whole number", "unset", "1 to 4096")
    ]


def test_a_name_that_does_not_exist_gets_the_nearest(chapters):
    with pytest.raises(NotFound, match=r"nothing is called 'data.imagse'; did you mean 'data.images'\?"):
        found("data.imagse", chapters)


class Inner(Config):
    """A table inside."""

    deep: int = Field(7, gt=2, lt=9)  # how deep
    # it goes
    way: Literal["up", "down"] = "up"


class Shape(Config):
    """Some keys.

    More of them.
    """

    count: int = Field(ge=3, le=2**40)
    """How many."""
    # where it begins,
    start: float | None = Field(None, gt=-1.5)  # and ends
    pair: tuple[float, float] = (0.25, 4.0)
    on: bool = True
    inner: Inner = Inner(deep=5)
    each: tuple[Inner, ...] = ()


def test_a_class_is_read_as_it_checks():
    shape, inner, each = tables(Shape, "s", {"any": {"pair": "two", "count": "never"}})
    assert (shape.meaning, inner.path, each.path) == ("Some keys.", "s.inner", "s.each[]")
    told = [(key.name, key.kind, key.default, key.allowed, key.meaning) for key in shape.keys]
    assert told == [
        ("count", "whole number", None, f"3 to {2**40}", "How many."),
        ("start", "number", "unset", "above -1.5", "where it begins, and ends"),
        ("pair", "list of number", "[0.25, 4]", "2 entries", "two"),
        ("on", "true or false", "true", "", ""),
        ("inner", "table", "{deep = 5}", "", ""),
        ("each", "list of table", "empty", "", ""),
    ]
    assert [(key.allowed, key.meaning) for key in inner.keys] == [
        ("above 2 to 8", "how deep"),
        ("", "it goes"),
    ]

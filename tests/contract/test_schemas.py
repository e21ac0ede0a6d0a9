"""Every value of a recipe says what it is: a path, text that is data, or a table whose schema is known."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, Field

from distill_core.config import Config, DataPath, DataTable, PathMark, RecipeMark, TableMark, Words, WordsMark
from distill_core.data import source_types
from distill_core.kinds import find_card, kind_names
from distill_core.methods import find_method, method_names
from distill_core.networks.fields import FIELDS
from distill_core.networks.predictors import network_families, network_types
from distill_core.recipe import Recipe


def schemas() -> dict[str, type[BaseModel]]:
    """Each class that checks a table of a recipe, by what it is of."""
    return {
        "recipe": Recipe,
        **{f"method {name}": find_method(name).Config for name in method_names()},
        **{f"data {name}": source.Config for name, source in source_types().items()},
        **{f"kind {name}": find_card(name).Evaluate for name in kind_names()},
        **{f"network {name}": network.Args for name, network in network_types().items()},
        **{f"network {name}:": network.Args for name, network in network_families().items()},
        **{f"network {name}": field.Config for name, field in FIELDS.items()},
    }


def unsaid(schema: type[BaseModel], seen: tuple[type, ...] = ()) -> Iterator[str]:
    """The fields of a schema that do not say what their text is, or which keys their table has."""
    if schema not in seen:
        for name, field in schema.model_fields.items():
            if not _says(field.annotation, field.metadata):
                yield name
            for inner in _models(field.annotation):
                yield from (f"{name}.{deeper}" for deeper in unsaid(inner, (*seen, schema)))


def _says(annotation: Any, marks: list[Any]) -> bool:
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        marks = [*marks, *more]
    if any(isinstance(mark, PathMark | RecipeMark | WordsMark | TableMark) for mark in marks):
        return True
    if get_origin(annotation) is Literal or annotation in (int, float, bool, type(None), Ellipsis):
        return True
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return True
    if get_origin(annotation) is dict:  # its keys name roles or classes and are no values
        return _says(get_args(annotation)[1], [])
    if get_origin(annotation) in (Union, UnionType, list, tuple):
        return all(_says(one, []) for one in get_args(annotation))
    return False  # str, Any, dict, and whatever nobody has thought of


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for one in get_args(annotation):
        yield from _models(one)


@pytest.mark.parametrize("name", schemas())
def test_every_value_of_a_recipe_says_what_it_is(name):
    """A file is a `DataPath`; text that is data is `Words`; a table has a schema or a `TableMark`."""
    assert list(unsaid(schemas()[name])) == []


def test_what_says_nothing_is_found():
    class Inner(Config):
        column: str = ""

    class Silent(Config):
        text: str = ""
        path: DataPath = ""
        words: Words | None = None
        listed: tuple[str, ...] = ()
        table: dict[str, Any] = {}
        bare: dict = {}  # type: ignore[type-arg]
        anything: Any = None
        either: DataPath | str = ""
        data: DataTable | None = None
        inner: tuple[Inner, ...] = Field(())
        choice: Literal["a", "b"] = "a"
        size: float | tuple[int, int] | None = None

    expected = ["text", "listed", "table", "bare", "anything", "either", "inner.column"]
    assert list(unsaid(Silent)) == expected

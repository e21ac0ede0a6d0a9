"""References of a recipe or an evaluation, found by walking the schemas of its tables.

They are files and folders, other recipes, artifacts, and modules of ours that are found by a name. A path is what a
schema marks as a `DataPath`; so is text that looks like one where a schema says neither what it is nor which keys
there are, as in a method of another package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from distill_core.artifacts import ArtifactStore
from distill_core.config import ArtifactMark, PathMark, RecipeMark, TableMark, WordsMark
from distill_core.data import named_tables, names_source, parse_source
from distill_core.files.paths import check_readable, looks_like_path
from distill_core.kinds import find_card
from distill_core.methods import find_method
from distill_core.networks.fields import FIELDS
from distill_core.networks.predictors import network_types
from distill_core.recipe.recipe import Recipe
from distill_core.recipe.tables import NetworkConfig

_MARKS = (PathMark, RecipeMark, WordsMark, TableMark)


@dataclass(frozen=True)
class Named:
    """A reference by the dotted key that names it: a path, a recipe, an artifact, or a module of ours."""

    key: str
    value: str
    what: Literal["path", "recipe", "artifact", "code"] = "path"

    @property
    def is_file(self) -> bool:
        """Whether it names a file or folder of this machine; a recipe that is a file has paths of its own."""
        return self.what == "path" or (self.what == "recipe" and Path(self.value).suffix == ".toml")


def references(recipe: Recipe, tables: Collection[str] = Recipe.model_fields.keys()) -> Iterator[Named]:
    """References of a run of `recipe`, as far as these of its tables and keys say it.

    Raises:
        ConfigError: a table that its schema refuses. NotFound: no such method.
    """
    values = {name: getattr(recipe, name) for name in Recipe.model_fields if name in tables}
    method = find_method(recipe.method) if {"config", "evaluate"} & values.keys() else None
    return _Walk(method, recipe.data or {}).model(values, "", Recipe)


def evaluation_references(
    kind: str, table: Mapping[str, Any], data: Mapping[str, Any] | None
) -> Iterator[Named]:
    """References of an evaluation of a model of that kind.

    Raises:
        ConfigError: a table that its schema refuses. NotFound: no such kind.
    """
    walk = _Walk(None, data or {})
    if data:
        yield from walk.data_table(data, "data")
    yield from walk.model(find_card(kind).Evaluate.parse(table, where="evaluate"), "evaluate")


def check_job(spec: Mapping[str, Any], roots: Sequence[str] | None, store: ArtifactStore) -> None:
    """Refuse a training's or an evaluation's paths outside `roots`, links resolved; None: any may be read.

    Raises:
        ConfigError: such a path, or a recipe that is a file; `field` is its key.
        NotFound: no such method, or no such model in the store.
    """
    if roots is None:
        return
    if "recipe" in spec:
        named = references(Recipe.parse(spec["recipe"]))
    else:
        kind = store.manifest(spec["artifact"]).kind
        named = evaluation_references(kind, spec.get("evaluate", {}), spec.get("data"))
    for one in named:
        if one.is_file:
            folders = [Path(root) for root in roots]
            check_readable(one.key, one.value, folders, recipe=one.what == "recipe")


@dataclass(frozen=True)
class _Walk:
    """A walk through tables whose schemas `method` decides; `data` is what other data begins as."""

    method: Any
    data: Mapping[str, Any]

    def model(
        self, model: BaseModel | Mapping[str, Any], where: str, schema: type[BaseModel] | None = None
    ) -> Iterator[Named]:
        """Each value of a table, whether its schema has read it or not yet."""
        if isinstance(model, BaseModel):
            fields = (schema or type(model)).model_fields
            values: Mapping[str, Any] = {name: getattr(model, name) for name in fields}
        else:
            assert schema is not None, "a table that nothing has read comes with its schema"
            fields, values = schema.model_fields, model
        for name, value in values.items():
            key = f"{where}.{name}" if where else name
            if name in fields:
                yield from self.value(fields[name].annotation, fields[name].metadata, value, key, values)
            else:
                yield from self.loose(value, key)

    def value(
        self, annotation: Any, marks: Sequence[Any], value: Any, key: str, beside: Mapping[str, Any]
    ) -> Iterator[Named]:
        """One value, by what it is annotated with; `beside` are the table's other values."""
        while get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            marks = [*marks, *more]
        mark = next((mark for mark in marks if isinstance(mark, _MARKS)), None)
        if value is None:
            return
        if mark is not None:
            yield from self.marked(mark, value, key, beside)
        elif isinstance(value, NetworkConfig):
            yield from self.network(value, key)
        elif isinstance(value, BaseModel):
            yield from self.model(value, key)
        elif (
            isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, Mapping)
        ):
            yield from self.model(value, key, annotation)
        else:
            yield from self.inner(annotation, value, key, beside)

    def inner(self, annotation: Any, value: Any, key: str, beside: Mapping[str, Any]) -> Iterator[Named]:
        """The parts of a value: what it may be by turns, the items of a list, the entries of a table."""
        args = get_args(annotation)
        if get_origin(annotation) is Literal:
            return
        if get_origin(annotation) in (Union, UnionType):
            if any(get_origin(one) is Literal and value in get_args(one) for one in args):
                return
            kinds = [one for one in args if one is not type(None)]
            found = (named for one in kinds for named in self.value(one, (), value, key, beside))
            yield from dict.fromkeys(found)
        elif isinstance(value, Mapping) and args:
            for name, entry in value.items():
                yield from self.value(args[-1], (), entry, f"{key}.{name}", beside)
        elif isinstance(value, list | tuple | set | frozenset) and args:
            kinds = [one for one in args if one is not Ellipsis]
            for place, entry in enumerate(value):
                yield from self.value(kinds[min(place, len(kinds) - 1)], (), entry, f"{key}.{place}", beside)
        else:
            yield from self.loose(value, key)

    def marked(self, mark: Any, value: Any, key: str, beside: Mapping[str, Any]) -> Iterator[Named]:
        """A value whose mark says what it is."""
        if isinstance(mark, RecipeMark):
            yield Named(key, str(value), "recipe")
        elif isinstance(mark, ArtifactMark):
            yield Named(key, str(value), "artifact")
        elif isinstance(mark, WordsMark):
            return
        elif isinstance(mark, PathMark):
            base = beside.get(mark.inside) if mark.inside else None
            yield Named(key, str(value if base is None else Path(str(base)) / str(value)))
        elif mark.of == "data":
            yield from self.data_table(value, key)
        elif mark.of == "method":
            yield from self.model(self.method.Config.parse(value, where=key), key)
        elif mark.of == "evaluate":
            yield from self.model(find_card(self.method.kind).Evaluate.parse(value, where=key), key)
        else:
            yield from self.loose(value, key)

    def data_table(self, table: Mapping[str, Any], key: str) -> Iterator[Named]:
        """A `[data]` table and those in it; one without a name is what is otherwise than in the recipe's."""
        if not table:
            return
        tables = (
            table
            if names_source(table) or table is self.data
            else {**named_tables(self.data)["data"], **table}
        )
        for name, values in named_tables(tables).items():
            where = key if name == "data" else f"{key}.{name}"
            if values or name == "data":
                source, config = parse_source(values, where=where)
                yield Named(where, source.__module__, "code")
                yield from self.model(config, where)

    def network(self, network: NetworkConfig, key: str) -> Iterator[Named]:
        """A network's arguments, some of which may follow from the data: they are not checked here."""
        cls = network_types().get(network.name) or FIELDS.get(network.name)
        schema = getattr(cls, "Args", None) or getattr(cls, "Config", None)
        args = network.args
        if cls is not None:
            yield Named(key, cls.__module__, "code")
        yield from (
            self.loose(args, f"{key}.args") if schema is None else self.model(args, f"{key}.args", schema)
        )

    def loose(self, value: Any, key: str) -> Iterator[Named]:
        """Whatever looks like a path in a value that no schema describes."""
        if isinstance(value, str | Path):
            if isinstance(value, Path) or looks_like_path(value):
                yield Named(key, str(value))
        elif isinstance(value, Mapping):
            for name, entry in value.items():
                yield from self.loose(entry, f"{key}.{name}")
        elif isinstance(value, list | tuple | set | frozenset):
            for place, entry in enumerate(value):
                yield from self.loose(entry, f"{key}.{place}")

"""Files and folders that a recipe or an evaluation names, found by walking the schemas of its tables.

What a schema marks as a `DataPath` is one; so is text that looks like a path where a schema says neither what it is
nor which keys there are, as in a method of another package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from distill_core.artifacts import ArtifactStore
from distill_core.config import PathMark, RecipeMark, TableMark, WordsMark
from distill_core.data import named_tables, parse_source
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
    """A file or folder, by the dotted key that names it; `recipe`: it is another recipe, with paths of its own."""

    key: str
    path: str
    recipe: bool = False


def recipe_paths(recipe: Recipe) -> Iterator[Named]:
    """Paths that a run of `recipe` may read.

    Raises:
        ConfigError: a table that its schema refuses. NotFound: no such method.
    """
    return _Walk(find_method(recipe.method), recipe.data or {}).model(recipe, "")


def evaluation_paths(kind: str, table: Mapping[str, Any], data: Mapping[str, Any] | None) -> Iterator[Named]:
    """Paths that an evaluation of a model of that kind may read.

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
        named = recipe_paths(Recipe.parse(spec["recipe"]))
    else:
        kind = store.manifest(spec["artifact"]).kind
        named = evaluation_paths(kind, spec.get("evaluate", {}), spec.get("data"))
    for one in named:
        check_readable(one.key, one.path, [Path(root) for root in roots], recipe=one.recipe)


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
        if value is None or isinstance(mark, WordsMark):
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
            paths = (named for one in args for named in self.value(one, (), value, key, beside))
            yield from dict.fromkeys(paths)
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
            if Path(str(value)).suffix == ".toml":
                yield Named(key, str(value), recipe=True)
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
            table if "name" in table or table is self.data else {**named_tables(self.data)["data"], **table}
        )
        for name, values in named_tables(tables).items():
            where = key if name == "data" else f"{key}.{name}"
            if values or name == "data":
                yield from self.model(parse_source(values, where=where)[1], where)

    def network(self, network: NetworkConfig, key: str) -> Iterator[Named]:
        """A network's arguments, some of which may follow from the data: they are not checked here."""
        schema = getattr(network_types().get(network.name), "Args", None)
        if schema is None and network.name in FIELDS:
            schema = FIELDS[network.name].Config
        args = network.args
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

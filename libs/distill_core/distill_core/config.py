"""Base of configurations: validated, frozen, and with the marks that say what a value names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from distill_core.errors import ConfigError, nearest

NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$"
NAME_RULE = (
    "allowed are 1 to 64 characters a-z, 0-9, '.', '_', '-', beginning and ending with a letter or digit"
)
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class PathMark:
    """Mark of a value that names a file or folder of the machine that runs the recipe.

    `inside` is the option beside it whose folder a relative name begins in.
    """

    def __init__(self, inside: str = "") -> None:
        self.inside = inside


class RecipeMark:
    """Mark of a recipe's name, which may be that of a file."""


class WordsMark:
    """Mark of text that is data (a title, a prompt, the name of a class or column) and never a path."""


class ArtifactMark(WordsMark):
    """Mark of a reference into the artifact store: name, name@version or name@alias."""


class TableMark:
    """Mark of a table whose schema is elsewhere.

    `data`: that of a data source, by its `name`, or what is otherwise than in `[data]`; `network`: arguments of a
    network; `method`, `evaluate`: of the recipe's method, and of its result's kind; `changes`: overrides by dotted key.
    """

    def __init__(self, of: Literal["data", "network", "method", "evaluate", "changes"]) -> None:
        self.of = of


DataPath = Annotated[str, PathMark()]
Words = Annotated[str, WordsMark()]
Name = Annotated[Words, StringConstraints(pattern=NAME_PATTERN)]
ArtifactRef = Annotated[str, ArtifactMark()]
RecipeName = Annotated[str, RecipeMark()]
DataTable = Annotated[dict[str, Any], TableMark("data")]
NetworkArgs = Annotated[dict[str, Any], TableMark("network")]
Changes = Annotated[dict[str, Any], TableMark("changes")]


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys are errors, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = set(get_args(kind) or (kind,))
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"{str(value).lower()} is no number")
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Validate `values`; a mistake becomes one `ConfigError` sentence that names the key under `where`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _as_config_error(cls, error, where) from None


def is_reserved_alias(alias: str) -> bool:
    """Whether no alias may be called so: it already means the newest version, or a version's number."""
    return alias == "latest" or alias.isdecimal()


def check_name(name: str, *, what: str, field: str | None = None) -> str:
    """`name` if it is a plain name (lower case, digits, `.`, `_`, `-`), which can never leave a folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"{what} {name!r} is not a plain name; {NAME_RULE}",
            field=field,
        )
    return name


def _as_config_error(cls: type[BaseModel], error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in ([where] if where else []) + list(first["loc"]))
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, first["loc"][:-1])
        return ConfigError(
            f"unknown key {path}{nearest(str(first['loc'][-1]), owner.model_fields)}", field=path
        )
    if first["type"] == "missing":
        return ConfigError(f"missing key {path}: it has no default", field=path)
    if first["type"] == "value_error":
        return ConfigError(f"{path or cls.__name__}: {first['ctx']['error']}", field=path)
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else given[:77] + "..."
    return ConfigError(f"{path} = {given} is not allowed: {_said(first, path)}", field=path)


def _said(error: Any, path: str) -> str:
    """What is allowed, in words; pydantic's own for most."""
    if error["type"] in ("dict_type", "model_type"):
        return f"a table of keys belongs here, e.g. {path}.KEY = VALUE"
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == NAME_PATTERN:
        return NAME_RULE
    return str(error["msg"][0].lower() + error["msg"][1:])


def _model_at(cls: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel]:
    for part in path:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        for option in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                cls = option
    return cls

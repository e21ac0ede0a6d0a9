"""Configurations in words: each key with its type, default, range and meaning, read from the class that checks it."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill_core.config import NAME_PATTERN

KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "unset",
}


@dataclass(frozen=True)
class Key:
    """One key; `default` is None where it has to be given, and `allowed` is empty where its type says it all."""

    name: str
    kind: str
    default: str | None
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """The keys of one table, at `path`; an entry of a list is `path[]`, a name that the user chooses is upper case."""

    path: str
    meaning: str
    keys: tuple[Key, ...]


def tables(
    model: type[BaseModel],
    path: str,
    words: Mapping[str, Mapping[str, str]],
    *,
    upper: Mapping[str, str] | None = None,
) -> Iterator[Table]:
    """The table of `model` and those inside it; `upper` names what users choose a name for, as `optim` its ROLE."""
    described = dict(words.get("any", {}))
    for place in (*(base.__name__ for base in reversed(model.__mro__)), path):
        described |= words.get(place, {})
    described |= meanings(model)
    schema = model.model_json_schema()
    inner, keys = [], []
    for name, field in model.model_fields.items():
        nested = _nested(field)
        keys.append(_key(name, field, schema, described.get(name, field.description or "")))
        if nested is not None:
            chosen = (upper or {}).get(name)
            deeper = f"{path}.{name}" if path else name
            deeper += (
                f".{chosen}" if chosen else "[]" if get_origin(field.annotation) in (list, tuple) else ""
            )
            if nested is not model and f".{name}" not in path:
                inner.append((nested, deeper))
    yield Table(path, first_sentence(model), tuple(keys))
    for nested, deeper in inner:
        first, *rest = tables(nested, deeper, words, upper=upper)
        yield from (
            replace(first, meaning=first.meaning or described.get(deeper.rpartition(".")[2], "")),
            *rest,
        )


def first_sentence(described: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return inspect.cleandoc(described.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The comments beside and above each field of a class, or the docstring below it."""
    described: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and not base.__module__.startswith("pydantic"):
            described |= {name: meaning for name, meaning in _own_meanings(base) if meaning}
    return described


def _own_meanings(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    source = textwrap.dedent(inspect.getsource(model))
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            alone |= {token.start[0]} if token.line.strip().startswith("#") else set()
    for node, after in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [
                comments[line] for line in range(first, (node.end_lineno or first) + 1) if line in comments
            ]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                lines = [inspect.cleandoc(str(after.value.value))]
            yield node.target.id, " ".join(lines).rstrip(" ,")


def _key(name: str, field: FieldInfo, schema: Mapping[str, Any], meaning: str) -> Key:
    shape = schema["properties"][str(field.validation_alias or name)]
    definitions = schema.get("$defs", {})
    default = None if field.is_required() else _value(field.get_default(call_default_factory=True))
    return Key(name, _kind(shape, definitions), default, _allowed(shape, definitions), meaning)


def _value(value: Any) -> str:
    if value is None or value in ("", (), {}, []):
        return "unset" if value is None else "empty"
    if isinstance(value, BaseModel):
        return (
            "its defaults"
            if value == type(value).model_construct()
            else _value(value.model_dump(exclude_defaults=True))
        )
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, int) and value > 2**32 and value & (value + 1) == 0:
        return f"2^{value.bit_length()} - 1"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _kind(shape: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in shape:
        known = definitions[shape["$ref"].rpartition("/")[2]]
        return "table" if known.get("type") == "object" else _kind(known, definitions)
    if "enum" in shape or "const" in shape:
        return "one of " + ", ".join(map(_value, shape.get("enum", [shape.get("const")])))
    if "anyOf" in shape:
        kinds = dict.fromkeys(_kind(one, definitions) for one in shape["anyOf"] if one.get("type") != "null")
        return " or ".join(kinds)
    if shape.get("type") == "array":
        items = [shape["items"]] if "items" in shape else shape.get("prefixItems", [{}])
        return f"list of {' or '.join(dict.fromkeys(_kind(item, definitions) for item in items))}"
    if shape.get("type") == "object":
        return "table"
    return "path" if shape.get("format") == "path" else KINDS.get(shape.get("type", ""), "any")


def _allowed(shape: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The range in words."""
    for key in ("anyOf", "items", "additionalProperties"):
        inner = shape.get(key)
        parts = inner if isinstance(inner, list) else [inner] if isinstance(inner, dict) else []
        own = _bounds(shape)
        for part in parts:
            resolved = definitions.get(part["$ref"].rpartition("/")[2], {}) if "$ref" in part else part
            if resolved.get("type") != "object" and (bounds := own or _allowed(resolved, definitions)):
                return bounds
    return _bounds(shape)


def _bounds(schema: Mapping[str, Any]) -> str:
    if schema.get("pattern") == NAME_PATTERN:
        return "a plain name"
    shape = dict(schema)
    if shape.get("type") == "integer" and "exclusiveMaximum" in shape:
        shape["maximum"] = shape.pop("exclusiveMaximum") - 1
    low = [f"{_value(shape[key])}" if key == "minimum" else f"above {_value(shape[key])}"
           for key in ("minimum", "exclusiveMinimum") if key in shape]  # fmt: skip
    high = [_value(shape[key]) if key == "maximum" else f"below {_value(shape[key])}"
            for key in ("maximum", "exclusiveMaximum") if key in shape]  # fmt: skip
    span = (
        " to ".join([*low, *high])
        if low and high
        else f"{low[0]} or more"
        if low and "above" not in low[0]
        else ""
    )
    span = span or (
        low[0] if low else f"at most {high[0]}" if high and "below" not in high[0] else "".join(high)
    )
    more = [f"multiples of {_value(shape['multipleOf'])}"] if "multipleOf" in shape else []
    if "minItems" in shape or "maxItems" in shape:
        few, many = shape.get("minItems"), shape.get("maxItems")
        count = f"{few}" if few == many else f"{few or 0} to {many}" if many is not None else f"{few} or more"
        more.append(f"{count} entries")
    if "pattern" in shape:
        more.append(f"as {shape['pattern']}")
    return ", ".join([*([span] if span else []), *more])


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    return next(
        (kind for kind in _parts(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)),
        None,
    )


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)

"""The check that every config goes through: what is not understood has its neutral value, or the model is refused.

A class's `Keys` say which keys are read, and which are idle: they change how its own library samples or trains, and not
what the network answers. Any other key must have the value that the class takes without it; one that the class does
not know, no value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError

UNSET = (None, False)  # of a key that a class does not know: libraries write such ones for classes that do


@dataclass(frozen=True)
class Keys:
    """The keys of one class that are understood."""

    read: frozenset[str]  # by this package, or by the class itself, which needs nothing more for it
    idle: frozenset[str] = frozenset()
    bound: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)  # read where this holds
    why: Mapping[str, str] = field(default_factory=dict)  # what a key that is not understood would need


def names(text: str) -> frozenset[str]:
    """The names in a text."""
    return frozenset(text.split())


def check_keys(path: Path, config: Mapping[str, Any], keys: Keys, defaults: Mapping[str, Any]) -> None:
    """Refuse a config that says something that would be dropped; `defaults` are the class's own.

    Raises:
        ArtifactError: it does; the sentence names file and key.
    """
    problem = not_understood(config, keys, defaults)
    if problem is not None:
        raise ArtifactError(f"{path} says {problem}")


def not_understood(config: Mapping[str, Any], keys: Keys, defaults: Mapping[str, Any]) -> str | None:
    """Description of the first key that is not understood; None if all are."""
    for key, value in config.items():
        if key.startswith("_") or key in keys.idle or _understood(key, value, keys, defaults):
            continue
        neutral = shown(defaults[key]) if key in defaults else "null"
        why = f": {keys.why[key]}" if key in keys.why else ""
        return f"{key} = {shown(value)}, which is not understood{why}; only {neutral} is read"
    return None


def _understood(key: str, value: Any, keys: Keys, defaults: Mapping[str, Any]) -> bool:
    if key in keys.bound and keys.bound[key](value):
        return True
    if key not in defaults:
        return any(value is unset for unset in UNSET)
    return key in keys.read or _plain(value) == _plain(defaults[key])


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as JSON spells it, cut where it is long."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def defaults_of(cls: Any) -> dict[str, Any]:
    """Default of each argument of a class."""
    parameters = inspect.signature(cls.__init__).parameters
    return {
        name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty
    }

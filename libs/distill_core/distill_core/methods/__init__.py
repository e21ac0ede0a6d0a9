"""Methods, found by their file's name in `methods/<family>/`, then among the `distillery.methods` entry points."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from distill_core.errors import ConfigError, NotFound, missing_package, nearest
from distill_core.method import Method


def method_files() -> dict[str, str]:
    """Method name -> module, for every file of every family folder."""
    root = Path(__file__).parent
    return {
        path.stem: f"{__name__}.{path.parent.name}.{path.stem}"
        for path in sorted(root.glob("*/*.py"))
        if not path.stem.startswith("_")
    }


def method_names() -> list[str]:
    """Names of all methods: ours and those that installed packages offer."""
    return sorted({*method_files(), *(entry.name for entry in entry_points(group="distillery.methods"))})


def find_method(name: str) -> type[Method]:
    """The method class of that name.

    Raises:
        NotFound: no such method; names the nearest. Unavailable: a package it needs is not installed.
    """
    if name in method_files():
        try:
            module = importlib.import_module(method_files()[name])
        except ModuleNotFoundError as error:
            raise missing_package(str(error.name), "train") from error
        return _method_in(module)
    for entry in entry_points(group="distillery.methods"):
        if entry.name == name:
            loaded: type[Method] | ModuleType = entry.load()
            return loaded if isinstance(loaded, type) else _method_in(loaded)
    raise NotFound(f"no method is called {name!r}{nearest(name, method_names())}", field="method")


def needs(method: type[Method]) -> list[str]:
    """Keyword names of the constructor: teacher, student, network, data, seed."""
    signature = inspect.signature(method.__init__)
    return [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def family(method: type[Method]) -> str:
    """The folder a method lives in; an outside package's name otherwise."""
    parts = method.__module__.split(".")
    return parts[2] if parts[:2] == ["distill_core", "methods"] else parts[0]


def _method_in(module: ModuleType) -> type[Method]:
    name = getattr(module, "__name__", "")
    methods = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == name
    ]
    if len(methods) != 1:
        raise ConfigError(f"{name} must define exactly one Method subclass, it defines {len(methods)}")
    return methods[0]

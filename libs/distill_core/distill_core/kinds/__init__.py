"""Kinds of models that methods produce, found by their folders' names, then among the `distillery.kinds` entry points.

`kinds/NAME/card.py` holds `Card`, `Evaluate`, `signature`, `facts`, `why_not_exported` and `SERVED` (how a server
answers: `generate`, `render`, `call`, or "" for not at all), and imports no torch; `kinds/NAME/kind.py` holds `KIND`,
the rest. Services ask the kind; none switches on its name.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distill_core.errors import NotFound, nearest

if TYPE_CHECKING:
    from distill_core.kinds.base import Kind

ENTRY_POINTS = "distillery.kinds"  # each names a package with the modules `card` and `kind`


def kind_names() -> list[str]:
    """Names of all kinds: ours and those that installed packages offer."""
    own = {path.parent.name for path in Path(__file__).parent.glob("*/card.py")}
    return sorted(own | {entry.name for entry in entry_points(group=ENTRY_POINTS)})


def find_card(name: str) -> Any:
    """The module of a kind that knows its card: `Card`, `Evaluate`, `SERVED`, `signature(card)`, `facts(card)`.

    Raises:
        NotFound: no such kind; names the nearest.
    """
    return _module(name, "card")


def find_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        NotFound: no such kind; names the nearest.
    """
    kind: Kind = _module(name, "kind").KIND
    return kind


@functools.cache
def _module(name: str, half: str) -> ModuleType:
    if (Path(__file__).parent / name / f"{half}.py").is_file() and name.isidentifier():
        return importlib.import_module(f"{__name__}.{name}.{half}")
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            return importlib.import_module(f"{entry.value}.{half}")
    raise NotFound(f"no kind of model is called {name!r}{nearest(name, kind_names())}", field="kind")

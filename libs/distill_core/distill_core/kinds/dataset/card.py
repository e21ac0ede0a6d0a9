"""Card of a data set that a method made: how many items of which columns. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from distill_core.config import Config
from distill_core.recipe.tables import EvaluateConfig
from distill_core.signature import Signature, TensorSpec

SERVED = ""
ColumnName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class Card(Config):
    """Facts of a data set that a listing needs without its items."""

    items: int = Field(0, ge=0)
    columns: dict[ColumnName, TensorSpec] = {}  # x0 are pictures, class_label their classes
    class_names: tuple[str, ...] = ()
    prompts: bool = False  # whether each item has words


class Evaluate(EvaluateConfig):
    """Nothing is measured of a data set by itself: figures are the method's."""


def signature(card: Card) -> Signature:
    """No functions: a data set is read, not called."""
    return Signature()


def facts(card: Card) -> dict[str, Any]:
    """What people want to know of a data set, in few words."""
    return {
        "items": card.items,
        "classes": len(card.class_names) or None,
        "columns": ", ".join(f"{name} {spec.described}" for name, spec in card.columns.items()),
    }


def why_not_exported(card: Card) -> str:
    """Why no graph is made of it."""
    return "a data set is no function of tensors; its version holds data.parquet, which `datasets` reads"

"""Card of a predictor: functions from tensors to tensors, as classifiers and encoders are. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distill_core.config import Config, DataTable, EvaluateConfig
from distill_core.signature import Function, FunctionName, Signature

SERVED = "call"


class Card(Config):
    """Facts of a predictor that a server needs without its weights."""

    functions: dict[FunctionName, Function] = {}  # the first is the one that the model's bare name calls
    class_names: tuple[str, ...] = ()  # of the last axis of `logits`
    parameters: int = Field(0, ge=0)


class Evaluate(EvaluateConfig):
    """What predictions are measured on."""

    held_out: DataTable | None = (
        None  # data kept from training; unset: `[data.held_out]` of the recipe, if any
    )


def signature(card: Card) -> Signature:
    """The functions of the card."""
    return Signature(functions=card.functions)


def facts(card: Card) -> dict[str, Any]:
    """What people want to know of a predictor, in few words."""
    return {"classes": len(card.class_names) or None, "parameters": card.parameters}


def why_not_exported(card: Card) -> str:
    """Why no graph is made of such a model; "" where there is one."""
    return "" if card.functions else "it does not say what it takes and answers; train and publish it again"

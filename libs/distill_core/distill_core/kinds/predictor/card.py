"""Card of a predictor: functions from tensors to tensors, as classifiers and encoders are. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from distill_core.config import Config, Words
from distill_core.recipe.tables import EvaluateConfig, ModelSource
from distill_core.signature import Function, FunctionName, Signature

SERVED = "call"
GroupName = Annotated[Words, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Card(Config):
    """Facts of a predictor that a server needs without its weights."""

    functions: dict[FunctionName, Function] = {}  # the first is the one that the model's bare name calls
    class_names: tuple[str, ...] = ()  # of the last axis of `logits`
    parameters: int = Field(0, ge=0)
    packed_bits: int | None = Field(None, ge=1, le=8)  # of a weight on disk; unset: its file keeps floats


class Range(Config):
    """Items whose `column` is within `low` to `high`, both included."""

    column: Words  # of the data, one number an item
    low: float  # least value that is counted
    high: float  # largest value that is counted


class Evaluate(EvaluateConfig):
    """What predictions are measured on: `data`, kept from training. Without it a run has no figures of its result."""

    # classes by name whose accuracy is measured apart, e.g. { tail = ["8", "9"] } gives tail_accuracy
    groups: dict[GroupName, tuple[Words, ...]] = {}
    by: Words | None = None  # a column of numbers: accuracy at each of its values, e.g. by = "snr"
    # items by a column's range, e.g. { clear = { column = "snr", low = 0, high = 10 } } gives clear_accuracy
    ranges: dict[GroupName, Range] = {}
    # further models that are measured and shown beside the result, e.g. the same student without a teacher
    beside: dict[GroupName, ModelSource] = {}

    @property
    def sources(self) -> dict[str, ModelSource]:
        """The models that are measured beside the result, by key."""
        return {f"beside.{name}": source for name, source in self.beside.items()}


def signature(card: Card) -> Signature:
    """The functions of the card."""
    return Signature(functions=card.functions)


def facts(card: Card) -> dict[str, Any]:
    """What people want to know of a predictor, in few words."""
    found = {"classes": len(card.class_names) or None, "parameters": card.parameters}
    return found if card.packed_bits is None else {**found, "bits a weight": card.packed_bits}


def why_not_exported(card: Card) -> str:
    """Why no graph is made of such a model; "" where there is one."""
    if not card.functions:
        return "it does not say what it takes and answers; train and publish it again"
    return next(filter(None, (_why_not(name, function) for name, function in card.functions.items())), "")


def _why_not(name: str, function: Function) -> str:
    for key, spec in (*function.inputs.items(), *function.outputs.items()):
        if spec.dtype == "text":
            return (
                f"{key} of its function {name} is text, and graphs take and give numbers; serve it with torch"
            )
    if not function.inputs:
        return f"its function {name} has no input, and a graph's batch is that of its inputs; serve it with torch"
    if shared := sorted(function.inputs.keys() & function.outputs.keys()):
        return (
            f"{shared[0]} is an input and an output of its function {name}, and a graph tells its tensors apart by "
            "name alone; give one of them another name and publish it again"
        )
    return ""

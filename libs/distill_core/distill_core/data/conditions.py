"""Data without pictures, for methods that learn from a teacher alone: class labels, prompts, or nothing."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, StringConstraints, model_validator

from distill_core.config import Config as SourceConfig
from distill_core.config import DataPath, Words
from distill_core.data.huggingface import is_table, prompts_in
from distill_core.data.prompts import MAX_PROMPT, checked_prompts, read_lines
from distill_core.data.source import Source, existing
from distill_core.method import Batch

Prompt = Annotated[Words, StringConstraints(min_length=1, max_length=MAX_PROMPT)]


class Classes(Source):
    """Every class equally often."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["classes"] = "classes"
        num_classes: int = Field(ge=1, le=1_000_000)

    def __init__(self, config: Config) -> None:
        names = tuple(str(number) for number in range(config.num_classes))
        super().__init__(config, size=len(names), labels=torch.arange(len(names)), class_names=names)


class Prompts(Source):
    """Prompts in order: the lines of a text file, a column of a table, or a list."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["prompts"] = "prompts"
        path: DataPath | None = (
            None  # a text file, one prompt per line; a parquet or arrow file, or a folder of them
        )
        column: Words | None = None  # of a table; unset: found by its name
        split: Words = "train"  # of a table
        prompts: tuple[Prompt, ...] | None = None

        @model_validator(mode="after")
        def _exactly_one(self) -> Self:
            if (self.path is None) == (self.prompts is None):
                raise ValueError("give exactly one of path (lines or a table) and prompts (a list)")
            return self

    def __init__(self, config: Config) -> None:
        prompts = _prompts(config)
        super().__init__(config, size=len(prompts), prompts=prompts)


class Nothing(Source):
    """No data at all: the method draws what it needs, such as the poses to look at a scene from."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["nothing"] = "nothing"

    def __init__(self, config: Config) -> None:
        super().__init__(config, size=1)

    def read(self, size: int, *, epoch_seed: int, position: int) -> Batch:
        """`size` of whatever the method draws."""
        return Batch.of(size)


def _prompts(config: Prompts.Config) -> list[str]:
    if config.path is None:
        return checked_prompts(config.prompts or (), what="data.prompts", field="data.prompts")
    if is_table(existing(config.path)):
        return prompts_in(config.path, split=config.split, column=config.column)
    return read_lines(config.path)


SOURCES = {"classes": Classes, "nothing": Nothing, "prompts": Prompts}

"""Conditions without pictures, for methods that learn from a teacher alone: class labels, or prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, StringConstraints, model_validator
from torch import Tensor

from distill_core.config import Config as SourceConfig
from distill_core.data.source import Source, existing
from distill_core.errors import DataError

MAX_PROMPT_FILE = 64 * 2**20  # bytes
MAX_PROMPT = 4096  # characters
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT)]


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
    """`prompts` in order, as `prompt_embeds` once `encode_with` has been told how."""

    class Config(SourceConfig):
        """Options of the recipe's `[data]` table."""

        name: Literal["prompts"] = "prompts"
        path: str | None = None  # a text file, one prompt per line
        prompts: tuple[Prompt, ...] | None = None

        @model_validator(mode="after")
        def _exactly_one(self) -> Self:
            if (self.path is None) == (self.prompts is None):
                raise ValueError("give exactly one of path (one prompt per line) and prompts (a list)")
            return self

    def __init__(self, config: Config) -> None:
        self.prompts = _read_lines(config.path) if config.path else list(config.prompts or ())
        if not self.prompts:
            where = config.path or "data.prompts"
            raise DataError(f"{where} holds no prompt; give at least one", field="data.prompts")
        self._encode: Callable[[list[str]], dict[str, Tensor]] | None = None
        super().__init__(config, size=len(self.prompts))

    def encode_with(self, encode: Callable[[list[str]], dict[str, Tensor]]) -> None:
        """Give batches the embeddings that `encode` makes; the builder passes the teacher's text encoder."""
        self._encode = encode

    def conditions(self, indices: Tensor) -> dict[str, Tensor]:
        if self._encode is None:
            return {}
        return self._encode([self.prompts[index] for index in indices.tolist()])


def _read_lines(path: str) -> list[str]:
    file = existing(path)
    if not file.is_file() or file.stat().st_size > MAX_PROMPT_FILE:
        raise DataError(f"{path} is not a text file of at most {MAX_PROMPT_FILE} bytes", field="data.path")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", field="data.path") from None
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_PROMPT:
            raise DataError(
                f"line {number} of {path} is longer than {MAX_PROMPT} characters", field="data.path"
            )
    return [line for line in lines if line]


SOURCES = {"classes": Classes, "prompts": Prompts}

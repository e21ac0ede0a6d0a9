"""A prompt's tokens, without transformers: the `tokenizer/` folders of a diffusers pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.artifacts import CondSpec
from distill_core.artifacts.prompt_reading import PROMPTS, PromptReading, TokenInput
from distill_core.errors import ArtifactError, missing_package


class PromptTokens:
    """Prompts to the inputs of a text graph, cut and padded as the text encoders were trained."""

    def __init__(self, model: Path, reading: PromptReading) -> None:
        self.zero_null = reading.zero_null
        both = (False, reading.tokens), (True, reading.negative)
        names = {each.tokenizer for _, inputs in both for each in inputs}
        read = {name: _Tokenizer(model / name) for name in names}
        self._inputs = {
            negative: [(each, read[each.tokenizer].cutting(each.length)) for each in inputs]
            for negative, inputs in both
        }
        self._most = max(each.limit for each in reading.tokens)
        self._longest = [read[each.tokenizer] for each in reading.tokens if each.limit == self._most]

    def __call__(self, prompts: list[str], *, negative: bool = False) -> dict[str, np.ndarray]:
        """Inputs int64 (B, length) by name; `negative`: of prompts that guidance leads away from."""
        feed: dict[str, np.ndarray] = {}
        for each, cutting in self._inputs[negative]:
            coded = cutting.encode_batch([each.worded(prompt) for prompt in prompts])
            columns = [one.ids for one in coded], [one.attention_mask for one in coded]
            feed |= zip(each.names, (np.array(column, dtype=np.int64) for column in columns))
        return feed

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than the text encoders read."""
        if len(prompt.encode(errors="replace")) + 2 <= self._most:  # were every byte a token
            return False
        return any(tokenizer.count(prompt) > self._most for tokenizer in self._longest)


def reading_of(folder: Path, cond: CondSpec) -> PromptReading:
    """How the text graph in `folder` reads prompts; exports of before the file existed read CLIP's tokens.

    Raises:
        ArtifactError: the file is damaged, or missing where prompts are more than such tokens.
    """
    path = folder / PROMPTS
    if not path.is_file():
        if cond.masked or cond.pooled_dim is not None:
            raise ArtifactError(f"{PROMPTS} is missing beside the graphs; convert the model again")
        plain = TokenInput(length=cond.max_tokens or 77, limit=cond.max_tokens or 77)
        return PromptReading(tokens=(plain,), negative=(plain,))
    try:
        return PromptReading.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{PROMPTS} cannot be read: {error}; convert the model again") from None


class _Tokenizer:
    """A tokenizer's file."""

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise missing_package("tokenizers", "sampler") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception on a damaged file
            raise ArtifactError(f"{folder.name}/ cannot be read: {error}; publish the model again") from None
        self._pad = _text(config.get("pad_token")) or _text(config.get("eos_token")) or "<|endoftext|>"
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, text: str) -> int:
        """Tokens of a text, uncut."""
        return len(self._tokenizer.encode(text).ids)

    def cutting(self, length: int) -> Any:
        """The tokenizer whose answers all have this length."""
        cutting = type(self._tokenizer).from_str(self._tokenizer.to_str())
        cutting.enable_truncation(length)
        pad_id = cutting.token_to_id(self._pad) or 0
        cutting.enable_padding(length=length, pad_token=self._pad, pad_id=pad_id)
        return cutting


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""

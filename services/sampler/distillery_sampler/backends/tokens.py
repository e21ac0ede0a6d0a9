"""A prompt's tokens, without transformers: the `tokenizer/` folder of a diffusers pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.errors import ArtifactError, missing_package


class PromptTokens:
    """Prompts to input_ids int64 (B, max_tokens), cut and padded as the text encoder was trained."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise missing_package("tokenizers", "sampler") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception on a damaged file
            raise ArtifactError(f"tokenizer/ cannot be read: {error}; publish the model again") from None
        pad = _text(config.get("pad_token")) or _text(config.get("eos_token")) or "<|endoftext|>"
        self._max_tokens, self._uncut = max_tokens, Tokenizer.from_str(self._tokenizer.to_str())
        self._uncut.no_truncation()
        self._uncut.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(
            length=max_tokens, pad_token=pad, pad_id=self._tokenizer.token_to_id(pad) or 0
        )

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return np.array([coded.ids for coded in self._tokenizer.encode_batch(prompts)], dtype=np.int64)

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than the text encoder reads."""
        most = len(prompt.encode(errors="replace")) + 2  # were every byte a token
        return most > self._max_tokens and len(self._uncut.encode(prompt).ids) > self._max_tokens


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""

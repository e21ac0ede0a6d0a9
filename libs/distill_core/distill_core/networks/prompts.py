"""Base of what turns prompts into conditions: the frozen tokenizers and text models of a pipeline."""

from __future__ import annotations

import abc
import copy
import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill_core.artifacts import CondSpec
from distill_core.method import Cond

# Embeddings kept, so that no prompt in use is encoded twice: 1,100 prompts of Stable Diffusion 1.5, 400 of SDXL.
CACHE_BYTES = 256 * 2**20
MAX_CACHED = 16_384  # prompts, however small
_TOKENIZING = threading.Lock()  # a tokenizer keeps whether it cuts, from one call to the next


class PromptEncoder(abc.ABC):
    """Tokenizers and text models by their sub-folders: `prompt_embeds` (B, T, D), and what else a network reads.

    Each prompt is encoded by itself, in the models' own precision: its embedding depends on nothing else, neither the
    rest of the batch, nor what was asked before, nor autocast. So a cache changes no bit.
    """

    pooled_dim: int | None = None  # width of `pooled_embeds`, for encoders that give them
    gives_mask = False  # whether `prompt_mask` (B, T) int64, 1 where a token is, is among the conditions
    minds_negative = False  # whether a prompt that guidance leads away from is encoded otherwise
    masked = False  # whether a text model that gives no mask is shown one, beyond the tokens
    max_tokens: int  # T

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)
        for model in self.models:
            model.eval().requires_grad_(False)
        self._forget()

    def _forget(self) -> None:
        """Begin with no prompt kept."""
        kept = CACHE_BYTES // (4 * self.max_tokens * self.embed_dim)
        self._embedded = functools.lru_cache(maxsize=min(kept, MAX_CACHED))(self._embed)

    @property
    @abc.abstractmethod
    def embed_dim(self) -> int:
        """D."""

    @abc.abstractmethod
    def _answer(self, prompt: str, negative: bool) -> Cond:
        """The conditions (1, ...) of a prompt; `negative`: of one that guidance leads away from."""

    @property
    def models(self) -> list[nn.Module]:
        """The text models."""
        return [part for part in self.parts.values() if isinstance(part, nn.Module)]

    @property
    def limits(self) -> dict[str, int]:
        """The most tokens that are read, by tokenizer."""
        return {name: self.max_tokens for name in self.parts if name.startswith("tokenizer")}

    @property
    def options(self) -> dict[str, Any]:
        """Entries of a pipeline's index for the encoder, beside its parts."""
        return {}

    def cond(self) -> CondSpec:
        """The conditions of a network that reads these prompts."""
        return CondSpec(
            kind="prompt",
            max_tokens=self.max_tokens,
            embed_dim=self.embed_dim,
            pooled_dim=self.pooled_dim,
            masked=self.gives_mask,
        )

    def encode(self, prompts: list[str], *, negative: bool = False) -> Cond:
        """The conditions of the prompts (B, ...), on the models' device; padded and cut to the tokens that are read."""
        device = str(next(iter(self.models)).device)
        how = (True,) if negative and self.minds_negative else ()
        conditions = [self._embedded(prompt, device, *how) for prompt in prompts]
        return {name: torch.cat([cond[name] for cond in conditions]) for name in conditions[0]}

    def null(self) -> Cond:
        """The condition (1, ...) that means "none"."""
        return self.encode([""], negative=True)

    def read_tokens(self, count: int) -> None:  # noqa: B027
        """Read as many tokens of a prompt as a network was trained with, where that is a choice."""

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than are read, so that `encode` leaves its end out."""
        most = max(self.limits.values())
        if len(prompt.encode(errors="replace")) + 2 <= most:  # not even if every byte were a token
            return False
        longest = [name for name, limit in self.limits.items() if limit == most]
        return any(self._length(self.parts[name], prompt) > most for name in longest)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all parts; the entries of the pipeline's index."""
        for name, part in self.parts.items():
            part.save_pretrained(folder / name)
        return self.parts

    def copied(self) -> Self:
        """The same encoder with weights of its own."""
        other = copy.copy(self)
        other.parts = {
            name: copy.deepcopy(part) if isinstance(part, nn.Module) else part
            for name, part in self.parts.items()
        }
        other._forget()
        return other

    def to(self, device: torch.device | str) -> PromptEncoder:
        """Move the models."""
        for model in self.models:
            model.to(device)
        self._embedded.cache_clear()
        return self

    def _length(self, tokenizer: Any, prompt: str) -> int:
        with _TOKENIZING:
            return len(tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids)

    def _embed(self, prompt: str, device: str, negative: bool = False) -> Cond:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            return self._answer(prompt, negative)

    def _tokenized(self, tokenizer: Any, prompt: str, length: int | None = None) -> Any:
        """`input_ids` and `attention_mask` (1, length) of a prompt, padded and cut."""
        with _TOKENIZING:
            tokens = tokenizer(
                [prompt],
                padding="max_length",
                max_length=length or self.max_tokens,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        return tokens.to(next(iter(self.models)).device)

    def _unpadded(self, tokenizer: Any, prompt: str, most: int) -> Any:
        """`input_ids` and `attention_mask` (1, T) of a prompt, cut."""
        with _TOKENIZING:
            tokens = tokenizer(
                [prompt],
                padding=False,
                max_length=most,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        return tokens.to(next(iter(self.models)).device)


def filled(states: Tensor, tokens: int) -> Cond:
    """The conditions of hidden states (1, T, D): zeros behind them, up to `tokens`, and the mask that says so."""
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    behind = tokens - states.shape[1]
    return {"prompt_embeds": pad(states, (0, 0, 0, behind)), "prompt_mask": pad(mask, (0, behind))}

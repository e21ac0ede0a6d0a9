"""Base of what turns prompts into conditions: the frozen tokenizers and text models of a pipeline."""

from __future__ import annotations

import abc
import copy
import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill_core.artifacts import CondSpec
from distill_core.artifacts.prompt_reading import PromptReading, TokenInput
from distill_core.errors import ArtifactError
from distill_core.method import Cond

# Embeddings kept, so that no prompt in use is encoded twice: 1,100 prompts of Stable Diffusion 1.5, 400 of SDXL.
CACHE_BYTES = 256 * 2**20
MAX_CACHED = 16_384  # prompts, however small
MARK = "\ue000"  # stands for a prompt in a template; no text has it
_TOKENIZING = threading.Lock()  # a tokenizer keeps whether it cuts, from one call to the next


class PromptEncoder(abc.ABC):
    """Tokenizers and text models by their sub-folders: `prompt_embeds` (B, T, D), and what else a network reads.

    Each prompt is encoded by itself, in the models' own precision: its embedding depends on nothing else, neither the
    rest of the batch, nor what was asked before, nor autocast. So a cache changes no bit.
    """

    pooled_dim: int | None = None  # width of `pooled_embeds`, for encoders that give them
    gives_mask = False  # whether `prompt_mask` (B, T) int64, 1 where a token is, is among the conditions
    minds_negative = False  # whether a prompt that guidance leads away from is encoded otherwise
    zero_null = False  # whether zeros mean "no prompt", and not the empty prompt
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
    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        """What is tokenized of a prompt; `negative`: of one that guidance leads away from."""

    @abc.abstractmethod
    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        """The conditions (B, ...) of tokens (B, length) by the names that `reads` gives them: tensors in and out."""

    @property
    def reading(self) -> PromptReading:
        """How its prompts become the inputs of `conditions`, in words that need no library."""
        return PromptReading(
            tokens=self.reads(), negative=self.reads(negative=True), zero_null=self.zero_null
        )

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
            return self.conditions(self.tokens([prompt], negative=negative))

    def tokens(
        self, prompts: list[str], *, negative: bool = False, filled: bool = False
    ) -> dict[str, Tensor]:
        """The inputs of `conditions`, on the models' device.

        `filled`: those that a graph is fed, all of the full length; otherwise a single prompt may be shorter.
        """
        device = next(iter(self.models)).device
        found: dict[str, Tensor] = {}
        for each in self.reads(negative):
            with _TOKENIZING:
                tokens = self.parts[each.tokenizer](
                    [each.worded(prompt) for prompt in prompts],
                    padding="max_length" if filled or each.filled else False,
                    max_length=each.length,
                    truncation=True,
                    return_attention_mask=True,
                    return_tensors="pt",
                )
            both = tokens.input_ids, tokens.attention_mask
            found |= {name: value.to(device) for name, value in zip(each.names, both)}
        return found

    def _read(self, tokenizer: str = "tokenizer", length: int | None = None, **how: Any) -> TokenInput:
        limit = self.limits[tokenizer]
        return TokenInput(tokenizer=tokenizer, length=length or self.max_tokens, limit=limit, **how)


def filled(states: Tensor, mask: Tensor, tokens: int) -> Cond:
    """The conditions of hidden states (B, T, D): zeros where `mask` (B, T) says 0, and behind them up to `tokens`."""
    behind, kept = tokens - states.shape[1], states.masked_fill(mask[:, :, None] == 0, 0.0)
    return {"prompt_embeds": pad(kept, (0, 0, 0, behind)), "prompt_mask": pad(mask, (0, behind))}


def around(words: Callable[[str], str]) -> dict[str, str]:
    """What a template puts `before` and `after` a prompt.

    Raises:
        ArtifactError: it changes the prompt itself.
    """
    before, _, after = words(MARK).partition(MARK)
    probe = " A  b. "
    if words(probe) != before + probe + after:
        raise ArtifactError(
            "the chat template in tokenizer/ changes the words of a prompt, and such are not understood; take the "
            "template that the model was published with"
        )
    return {"before": before, "after": after}


def chatted(tokenizer: Any, *, thinking: bool) -> dict[str, str]:
    """What the tokenizer's chat template puts around the message of a user, up to where the answer begins."""

    def words(prompt: str) -> str:
        message, how = [{"role": "user", "content": prompt}], {"add_generation_prompt": True}
        text: str = tokenizer.apply_chat_template(message, tokenize=False, enable_thinking=thinking, **how)
        return text

    return around(words)

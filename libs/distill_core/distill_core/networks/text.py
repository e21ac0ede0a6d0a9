"""Prompts to conditions: the text encoders of text-to-image folders, and small ones made from a data set's words."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.method import Cond
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text_parts import damage_named, load_text_model, load_tokenizer
from distill_core.recipe.tables import NetworkConfig

TIME_IDS = 6  # numbers that SDXL is told beside the prompt: original size, corner of the crop, size
NEW_WIDTH, NEW_TOKENS = 32, 77  # of an encoder made from words: its width, and its tokens at most


class TextEncoder(PromptEncoder):
    """A tokenizer with its CLIP text model: the last hidden states are `prompt_embeds` (B, T, D)."""

    def __init__(self, tokenizer: Any, model: Any, **more: Any) -> None:
        self.max_tokens = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
        super().__init__({"tokenizer": tokenizer, "text_encoder": model, **more})

    @property
    def tokenizer(self) -> Any:
        return self.parts["tokenizer"]

    @property
    def model(self) -> Any:
        return self.parts["text_encoder"]

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.hidden_size)

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        """What pads a prompt is hidden where the model says so, as Stable Diffusion's pipelines do."""
        return (self._read(masked=bool(getattr(self.model.config, "use_attention_mask", False))),)

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        mask = tokens.get("attention_mask")
        return {"prompt_embeds": self.model(tokens["input_ids"], attention_mask=mask)[0]}


class DualTextEncoder(TextEncoder):
    """SDXL's: the penultimate hidden states of two models side by side, and `pooled_embeds` (B, P) of the second.

    `zero_null`: zeros mean "no prompt", as the published SDXL was trained; otherwise the empty prompt does.
    """

    def __init__(
        self, tokenizer: Any, model: Any, tokenizer_2: Any, model_2: Any, *, zero_null: bool
    ) -> None:
        self.zero_null, self.pooled_dim = zero_null, int(model_2.config.projection_dim)
        super().__init__(tokenizer, model, tokenizer_2=tokenizer_2, text_encoder_2=model_2)

    @property
    def tokenizer_2(self) -> Any:
        return self.parts["tokenizer_2"]

    @property
    def model_2(self) -> Any:
        return self.parts["text_encoder_2"]

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.hidden_size + self.model_2.config.hidden_size)

    @property
    def options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zero_null}

    def null(self) -> Cond:
        empty = super().null()
        return {name: torch.zeros_like(value) for name, value in empty.items()} if self.zero_null else empty

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        return self._read(), self._read("tokenizer_2")  # no mask, whatever the models say

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        first = self.model(tokens["input_ids"], output_hidden_states=True)
        second = self.model_2(tokens["input_ids_2"], output_hidden_states=True)
        hidden = first.hidden_states[-2], second.hidden_states[-2]
        return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled_embeds": second.text_embeds}


def load_text_encoder(folder: Path) -> TextEncoder:
    """The encoder of a diffusers folder: `tokenizer/` and `text_encoder/`, with a `_2` of each for SDXL.

    Raises:
        ArtifactError: a part is missing or damaged, or says something that is not understood.
    """
    with damage_named(folder):
        first = load_tokenizer(folder / "tokenizer"), load_text_model(folder / "text_encoder")
        if not (folder / "text_encoder_2").is_dir():
            return TextEncoder(*first)
        second = load_text_model(folder / "text_encoder_2", "CLIPTextModelWithProjection")
        return DualTextEncoder(
            *first, load_tokenizer(folder / "tokenizer_2"), second, zero_null=_zero_null(folder)
        )


def _zero_null(folder: Path) -> bool:
    index = folder / "model_index.json"
    if not index.is_file():
        return True
    try:
        return bool(read_table(index).get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{index} is damaged: {error}") from None


def check_text(config: Any, text: PromptEncoder) -> None:
    """Refuse a network, by its config, that is told more than `text` gives and a size, as SDXL's refiner is.

    Raises:
        ArtifactError: it is.
    """
    embeds, pooled = config.get("addition_embed_type"), text.pooled_dim
    if embeds is None:
        return
    width = config.get("projection_class_embeddings_input_dim")
    if embeds != "text_time" or pooled is None or width != pooled + TIME_IDS * config.addition_time_embed_dim:
        raise ArtifactError(
            f"this UNet2DConditionModel is told more than a prompt ({embeds}); known are Stable Diffusion 1.x, 2.x "
            "and SDXL's base model"
        )


def text_for(network: NetworkConfig, prompts: list[str] | None) -> TextEncoder:
    """A new encoder as wide as a text-conditional network wants it.

    Raises:
        ConfigError: no prompts, or a width that no encoder has.
    """
    if prompts is None:
        raise ConfigError(
            "a text-conditional network learns from prompts, and this data has none; choose pictures with captions "
            "(data.name = 'images' or 'huggingface'), or a UNet2DModel",
            field="data.name",
        )
    width = network.args.get("cross_attention_dim", NEW_WIDTH)
    if not isinstance(width, int) or width < 2 or width % 2:
        raise ConfigError(
            f"network.args.cross_attention_dim = {width!r} is not allowed: the prompts' encoder has an even width",
            field="network.args.cross_attention_dim",
        )
    return new_text_encoder(prompts, width=width)


def new_text_encoder(prompts: Iterable[str], *, width: int = NEW_WIDTH) -> TextEncoder:
    """A small frozen CLIP text model with random weights whose tokens are the words of `prompts`.

    It has as many tokens as the longest prompt needs. Other words are spelt, so any prompt can be encoded. The words
    decide the tokens and torch's global generator the weights.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    distinct = sorted(set(prompts))
    tokenizer = _word_tokenizer(sorted({word for prompt in distinct for word in _words(prompt)}))
    tokens = min(NEW_TOKENS, max(len(ids) for ids in tokenizer(distinct).input_ids))
    tokenizer.model_max_length = tokens
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return TextEncoder(tokenizer, model)


def _words(text: str) -> list[str]:
    """Words as CLIP's tokenizer splits them: letters together, digits and signs each by itself."""
    return re.findall(r"[^\W\d_]+|\d|[^\s\w]|_", text.lower())


def _word_tokenizer(words: list[str]) -> Any:
    """A CLIP tokenizer for which each of `words` is one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    spell = ByteLevel(add_prefix_space=False, use_regex=False)
    spelt = ["".join(piece for piece, _ in spell.pre_tokenize_str(word)) for word in words]
    letters = sorted(ByteLevel.alphabet())
    merges = _merges(spelt)
    joined = dict.fromkeys(left + right for left, right in merges)
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *joined]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
        rules.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        return CLIPTokenizer(str(vocab), str(rules), model_max_length=NEW_TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that make one token of each word."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while unfinished := next((piece for piece in pieces if len(piece) > 1), None):
        pair = unfinished[0], unfinished[1]
        merges.append(pair)
        pieces = [_merged(piece, pair) for piece in pieces]
    return merges


def _merged(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in piece:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged

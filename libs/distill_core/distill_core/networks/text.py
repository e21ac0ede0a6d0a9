"""Prompts to conditions: the text encoders of text-to-image folders, and small ones made from a data set's words."""

from __future__ import annotations

import copy
import functools
import json
import re
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.method import Cond
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.foreign.texts import check_text_model, check_tokenizer
from distill_core.networks.foreign.weights import variant_of
from distill_core.networks.foreign_configs import check_numbers
from distill_core.recipe.tables import NetworkConfig

# Embeddings kept, so that no prompt in use is encoded twice: 1,100 prompts of Stable Diffusion 1.5, 400 of SDXL.
CACHE_BYTES = 256 * 2**20
MAX_CACHED = 16_384  # prompts, however small
TIME_IDS = 6  # numbers that SDXL is told beside the prompt: original size, corner of the crop, size
_TOKENIZING = threading.Lock()  # a tokenizer keeps whether it cuts, from one call to the next
NEW_WIDTH, NEW_TOKENS = 32, 77  # of an encoder made from words: its width, and its tokens at most


class TextEncoder:
    """A tokenizer with its CLIP text model, both frozen: the last hidden states are `prompt_embeds` (B, T, D).

    Each prompt is encoded by itself, in the model's own precision: its embedding depends on nothing else, neither the
    rest of the batch, nor what was asked before, nor autocast. So a cache changes no bit.
    """

    pooled_dim: int | None = None  # width of `pooled_embeds`, for encoders that give them

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model.eval().requires_grad_(False)
        self.max_tokens = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
        kept = CACHE_BYTES // (4 * self.max_tokens * self.embed_dim)
        self._embedded = functools.lru_cache(maxsize=min(kept, MAX_CACHED))(self._embed)

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def options(self) -> dict[str, Any]:
        """Entries of a pipeline's index for the encoder, beside its parts."""
        return {}

    def encode(self, prompts: list[str]) -> Cond:
        """The conditions of the prompts (B, ...), on the model's device; padded and cut to the model's tokens."""
        device = str(self.model.device)
        conditions = [self._embedded(prompt, device) for prompt in prompts]
        return {name: torch.cat([cond[name] for cond in conditions]) for name in conditions[0]}

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than the model reads, so that `encode` leaves its end out."""
        if len(prompt.encode(errors="replace")) + 2 <= self.max_tokens:  # not even if every byte were a token
            return False
        return any(self._length(tokenizer, prompt) > self.max_tokens for tokenizer in self._tokenizers)

    @property
    def _tokenizers(self) -> list[Any]:
        return [self.tokenizer]

    def _length(self, tokenizer: Any, prompt: str) -> int:
        with _TOKENIZING:
            return len(tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids)

    def null(self) -> Cond:
        """The condition (1, ...) that means "none"."""
        return self.encode([""])

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all parts; the entries of the pipeline's index."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.model.save_pretrained(folder / "text_encoder")
        return {"tokenizer": self.tokenizer, "text_encoder": self.model}

    def copied(self) -> TextEncoder:
        """The same encoder with weights of its own."""
        return TextEncoder(self.tokenizer, copy.deepcopy(self.model))

    def to(self, device: torch.device | str) -> TextEncoder:
        self.model.to(device)
        self._embedded.cache_clear()
        return self

    def _embed(self, prompt: str, device: str) -> Cond:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            return self._answer(prompt)

    @property
    def masked(self) -> bool:
        """Whether what pads a prompt is hidden from it: Stable Diffusion's pipelines do so where the model says."""
        return bool(getattr(self.model.config, "use_attention_mask", False))

    def _answer(self, prompt: str) -> Cond:
        tokens = self._tokenized(self.tokenizer, prompt)
        mask = tokens.attention_mask if self.masked else None
        return {"prompt_embeds": self.model(tokens.input_ids, attention_mask=mask)[0]}

    def _tokenized(self, tokenizer: Any, prompt: str) -> Any:
        with _TOKENIZING:
            tokens = tokenizer(
                [prompt],
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            )
        return tokens.to(self.model.device)


class DualTextEncoder(TextEncoder):
    """SDXL's: the penultimate hidden states of two models side by side, and `pooled_embeds` (B, P) of the second.

    `zero_null`: zeros mean "no prompt", as the published SDXL was trained; otherwise the empty prompt does.
    """

    def __init__(
        self, tokenizer: Any, model: Any, tokenizer_2: Any, model_2: Any, *, zero_null: bool
    ) -> None:
        self.tokenizer_2, self.model_2 = tokenizer_2, model_2.eval().requires_grad_(False)
        self.zero_null, self.pooled_dim = zero_null, int(model_2.config.projection_dim)
        super().__init__(tokenizer, model)

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.hidden_size + self.model_2.config.hidden_size)

    @property
    def options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zero_null}

    @property
    def _tokenizers(self) -> list[Any]:
        return [self.tokenizer, self.tokenizer_2]

    def null(self) -> Cond:
        empty = super().null()
        return {name: torch.zeros_like(value) for name, value in empty.items()} if self.zero_null else empty

    def save(self, folder: Path) -> dict[str, Any]:
        self.tokenizer_2.save_pretrained(folder / "tokenizer_2")
        self.model_2.save_pretrained(folder / "text_encoder_2")
        return {**super().save(folder), "tokenizer_2": self.tokenizer_2, "text_encoder_2": self.model_2}

    def copied(self) -> TextEncoder:
        models = copy.deepcopy(self.model), copy.deepcopy(self.model_2)
        return DualTextEncoder(
            self.tokenizer, models[0], self.tokenizer_2, models[1], zero_null=self.zero_null
        )

    def to(self, device: torch.device | str) -> TextEncoder:
        self.model_2.to(device)
        return super().to(device)

    @property
    def masked(self) -> bool:
        return False  # by SDXL's pipelines, whatever the models say

    def _answer(self, prompt: str) -> Cond:
        first = self.model(self._tokenized(self.tokenizer, prompt).input_ids, output_hidden_states=True)
        second = self.model_2(self._tokenized(self.tokenizer_2, prompt).input_ids, output_hidden_states=True)
        hidden = first.hidden_states[-2], second.hidden_states[-2]
        return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled_embeds": second.text_embeds}


def load_text_encoder(folder: Path) -> TextEncoder:
    """The encoder of a diffusers folder: `tokenizer/` and `text_encoder/`, with a `_2` of each for SDXL.

    Raises:
        ArtifactError: a part is missing or damaged, or says something that is not understood.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    try:
        first = _tokenizer(folder / "tokenizer"), _text_model(folder / "text_encoder", CLIPTextModel)
        if not (folder / "text_encoder_2").is_dir():
            return TextEncoder(*first)
        second = _text_model(folder / "text_encoder_2", CLIPTextModelWithProjection)
        return DualTextEncoder(
            *first, _tokenizer(folder / "tokenizer_2"), second, zero_null=_zero_null(folder)
        )
    except ArtifactError:
        raise
    except Exception as error:  # transformers raises many kinds on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"text encoder or tokenizer in {folder} is damaged or incomplete: {reason}"
        ) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not _has_vocabulary(folder):  # it would read every word as unknown
        raise OSError(f"{folder.name}/ has neither tokenizer.json nor vocab.json with merges.txt")
    check_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _text_model(folder: Path, cls: Any) -> Any:
    """A text model in float32, whatever its weights are kept in."""
    check_numbers(folder)
    check_text_model(folder, cls)
    if is_faked():
        return cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    variant = variant_of(folder, "model")
    return cls.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, variant=variant, dtype=torch.float32
    )


def _has_vocabulary(folder: Path) -> bool:
    files = ("vocab.json", "merges.txt")
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in files)


def _zero_null(folder: Path) -> bool:
    index = folder / "model_index.json"
    if not index.is_file():
        return True
    try:
        return bool(read_table(index).get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{index} is damaged: {error}") from None


def check_text(config: Any, text: TextEncoder) -> None:
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

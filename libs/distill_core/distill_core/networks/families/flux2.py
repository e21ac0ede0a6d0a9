"""FLUX.2 klein: Qwen3 prompts in a chat, a flow of latents whose patches of 2 x 2 are channels (4 C, h, w).

Its shift depends on the picture's size and the number of steps, and its latents' scale is in the codec's weights.
FLUX.2 dev, which reads other prompts and is told a guidance scale, is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distill_core.artifacts import ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.errors import ArtifactError
from distill_core.method import Cond
from distill_core.networks.families.base import refuse_steering, token_map
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.foreign.index import entry_of
from distill_core.networks.prompts import PromptEncoder, chatted
from distill_core.networks.text_parts import load_text_model, load_tokenizer

TOKENS = 512
LAYERS = (9, 18, 27)  # of the text model, whose states stand side by side
SIDE = 64  # of x for the usual 1024 pixels: no config says it


class Flux2Text(PromptEncoder):
    """Hidden states of three layers, of the prompt as a user's message; filled up, and without a mask."""

    max_tokens = TOKENS

    def __init__(self, parts: Mapping[str, Any], *, distilled: bool) -> None:
        self.distilled = distilled
        super().__init__(parts)

    @property
    def embed_dim(self) -> int:
        return len(LAYERS) * int(self.parts["text_encoder"].config.hidden_size)

    @property
    def options(self) -> dict[str, Any]:
        return {"is_distilled": self.distilled}

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        words: dict[str, Any] = chatted(self.parts["tokenizer"], thinking=False)
        return (self._read(masked=True, **words),)

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        states = self.parts["text_encoder"](**tokens, output_hidden_states=True).hidden_states
        return {"prompt_embeds": torch.cat([states[layer] for layer in LAYERS], dim=-1)}


class Flux2(Prompted):
    """Joint blocks of text and image tokens, then single ones; a token is a place of x."""

    network: ClassVar[str] = "Flux2Transformer2DModel"
    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    interface: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "guidance_embeds",
    )
    guidance: ClassVar[float] = 4.0
    image_stream: ClassVar[int] = 1
    even_levels: ClassVar[bool] = True
    mu: ClassVar[Literal["line", "flux2"]] = "flux2"

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        prompt = cond["prompt_embeds"].to(x.dtype)
        answer = network(
            x.flatten(2).transpose(1, 2),
            encoder_hidden_states=prompt,
            timestep=time / 1000,
            img_ids=_places(x),
            txt_ids=_numbered(prompt),
        )
        return token_map(answer.sample, x, 1)

    def as_map(self, network: Any, feature: Any, x: Tensor) -> Tensor:
        return token_map(feature[self.image_stream], x, 1)

    def size(self, path: Path, config: Any) -> tuple[int, int]:
        return SIDE, SIDE

    def usual_guidance(self, config: Any, text: PromptEncoder | None) -> float:
        return 1.0 if isinstance(text, Flux2Text) and text.distilled else self.guidance

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        parts = {
            "tokenizer": load_tokenizer(folder / "tokenizer", "Qwen2Tokenizer"),
            "text_encoder": load_text_model(folder / "text_encoder", "Qwen3ForCausalLM"),
        }
        return Flux2Text(parts, distilled=bool(entry_of(folder, "is_distilled")))

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        if config.guidance_embeds:
            raise ArtifactError(
                f"{path} says guidance_embeds = true, which is not understood: the network is told a guidance scale, "
                "as FLUX.2 dev's is; only false is read"
            )
        layers = text.parts["text_encoder"].config.num_hidden_layers
        if layers < max(LAYERS):
            raise ArtifactError(
                f"{path} is of a network that reads layer {max(LAYERS)} of its text model, which has {layers}"
            )
        check_width(path, config, "joint_attention_dim", text.embed_dim)


def _places(x: Tensor) -> Tensor:
    """(0, row, column, 0) of each place of `x`, (h w, 4)."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None].expand(height, width)
    columns = torch.arange(width, device=x.device)[None].expand(height, width)
    none = torch.zeros_like(rows)
    return torch.stack([none, rows, columns, none], dim=-1).flatten(0, 1)


def _numbered(prompt: Tensor) -> Tensor:
    """(0, 0, 0, k) of each token, (T, 4)."""
    order = torch.arange(prompt.shape[1], device=prompt.device)
    none = torch.zeros_like(order)
    return torch.stack([none, none, none, order], dim=-1)

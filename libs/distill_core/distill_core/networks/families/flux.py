"""FLUX.1 dev and schnell: T5 prompts and a pooled CLIP prompt, a flow of latents in packed patches of 2 x 2.

dev is told a guidance scale as a number (Meng et al. 2022, arXiv 2210.03142): the condition `embedded_guidance` (B,).
Classifier-free guidance, by a negative prompt, is another number beside it, and off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.method import Cond
from distill_core.networks.families.base import refuse_steering, token_map
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text_parts import load_text_model, load_tokenizer

T5_TOKENS = 512  # that the pipeline reads by default; schnell was trained with 256
EMBEDDED = 3.5  # usual embedded guidance
SIDE = 128  # of the usual latents: no config says it
PATCH = 2


class FluxText(PromptEncoder):
    """T5's last states, and CLIP's pooled state, which is not projected. No mask."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.max_tokens = T5_TOKENS
        self.pooled_dim = int(parts["text_encoder"].config.hidden_size)
        super().__init__(parts)

    @property
    def embed_dim(self) -> int:
        return int(self.parts["text_encoder_2"].config.d_model)

    @property
    def limits(self) -> dict[str, int]:
        return {
            "tokenizer": int(self.parts["tokenizer"].model_max_length),
            "tokenizer_2": self.max_tokens,
        }

    def read_tokens(self, count: int) -> None:
        self.max_tokens = count

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        return tuple(self._read(name, length) for name, length in self.limits.items())

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        return {
            "prompt_embeds": self.parts["text_encoder_2"](tokens["input_ids_2"])[0],
            "pooled_embeds": self.parts["text_encoder"](tokens["input_ids"]).pooler_output,
        }


class Flux(Prompted):
    """Joint blocks of text and image tokens, then single ones; x is packed and positions are made here."""

    network: ClassVar[str] = "FluxTransformer2DModel"
    pipeline: ClassVar[str] = "FluxPipeline"
    index: ClassVar[dict[str, Any]] = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    interface: ClassVar[tuple[str, ...]] = (
        *("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds"),
    )
    image_stream: ClassVar[int] = 1
    even_levels: ClassVar[bool] = True

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        prompt, pooled = cond["prompt_embeds"].to(x.dtype), cond["pooled_embeds"].to(x.dtype)
        told = {"guidance": cond["embedded_guidance"]} if network.config.guidance_embeds else {}
        answer = network(
            packed(x),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=time / 1000,
            img_ids=positions(x),
            txt_ids=torch.zeros(prompt.shape[1], 3, dtype=torch.long, device=x.device),
            **told,
        )
        return unpacked(answer.sample, x)

    def as_map(self, network: Any, feature: Any, x: Tensor) -> Tensor:
        return token_map(feature[self.image_stream], x, PATCH)

    def channels(self, config: Any) -> tuple[int, int]:
        return config.in_channels // 4, (config.get("out_channels") or config.in_channels) // 4

    def size(self, path: Path, config: Any) -> tuple[int, int]:
        return SIDE, SIDE

    def patch(self, config: Any) -> int:
        return PATCH

    def plain_latents(self, image: ImageSpec) -> list[str]:
        return packing_code(image)

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        embedded = EMBEDDED if config.guidance_embeds else None
        return super().cond(config, text).model_copy(update={"embedded_guidance": embedded})

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        return FluxText(
            {
                "tokenizer": load_tokenizer(folder / "tokenizer"),
                "text_encoder": load_text_model(folder / "text_encoder"),
                "tokenizer_2": load_tokenizer(folder / "tokenizer_2", "T5Tokenizer"),
                "text_encoder_2": load_text_model(folder / "text_encoder_2", "T5EncoderModel"),
            }
        )

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        check_width(path, config, "joint_attention_dim", text.embed_dim)
        check_width(path, config, "pooled_projection_dim", text.pooled_dim)


def packed(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h w / 4, 4 C) of 2 x 2 patches, row by row; channel before place in each."""
    patches = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h/2, 2, w/2, 2)
    tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpacked(tokens: Tensor, x: Tensor) -> Tensor:
    """Tokens (B, h w / 4, 4 C) as latents of the height and width of `x`."""
    grid = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (x.shape[2] // PATCH, x.shape[3] // PATCH))
    latents: Tensor = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return latents


def packing_code(image: ImageSpec) -> list[str]:
    """Code that packs the variable `latents` (1, C, h, w)."""
    channels, height, width = image.channels, image.height // PATCH, image.width // PATCH
    return [
        f"latents = latents.reshape(1, {channels}, {height}, {PATCH}, {width}, {PATCH}).permute(0, 2, 4, 1, 3, 5)",
        f"latents = latents.reshape(1, {height * width}, {4 * channels})",
    ]


def positions(x: Tensor) -> Tensor:
    """(0, row, column) of each token of `x`, (h w / 4, 3)."""
    height, width = x.shape[2] // PATCH, x.shape[3] // PATCH
    rows = torch.arange(height, device=x.device)[:, None].expand(height, width)
    columns = torch.arange(width, device=x.device)[None].expand(height, width)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)

"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324): Qwen2.5-VL prompts in a template, a flow of packed latents.

Guidance keeps, in each patch, the length of the velocity with the condition (`diffusion.guidance`).
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
from distill_core.networks.diffusers_words import qwen_image_template
from distill_core.networks.families.base import refuse_steering, token_map
from distill_core.networks.families.flux import PATCH, SIDE, packed, packing_code, unpacked
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.prompts import PromptEncoder, around, filled
from distill_core.networks.rotation import Rotation, attended, projected, rotated
from distill_core.networks.text_parts import load_text_model, load_tokenizer

TOKENS = 512  # that the network reads by default


class QwenImageText(PromptEncoder):
    """The last hidden states of the prompt in its template, without the template's beginning."""

    gives_mask = True
    max_tokens = TOKENS

    @property
    def embed_dim(self) -> int:
        return int(self.parts["text_encoder"].config.get_text_config().hidden_size)

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        words, dropped = qwen_image_template()
        # The pipeline reads 1024 tokens beside the template: what stands behind those it keeps changes none of them.
        return (self._read(length=TOKENS + dropped, masked=True, filled=False, **around(words.format)),)

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        _, dropped = qwen_image_template()
        answer = self.parts["text_encoder"](**tokens, output_hidden_states=True)
        return filled(answer.hidden_states[-1][:, dropped:], tokens["attention_mask"][:, dropped:], TOKENS)


class _Positions(Rotation):
    """Positions of x of one size and of prompts of one length, in the place of the network's own."""

    image: Tensor
    text: Tensor

    def forward(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return self.image, self.text


class _RealAttention:
    """Joint attention of text and image tokens whose positions are real numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for states, turn in zip((encoder_hidden_states, hidden_states), image_rotary_emb[::-1], strict=True):
            query, key, value = projected(attn, states, added=states is encoder_hidden_states)
            parts.append((rotated(query, turn), rotated(key, turn), value))
        whole = torch.ones_like(hidden_states[:, :, 0], dtype=torch.bool)
        shown = torch.cat([encoder_hidden_states_mask, whole], dim=1)
        query, key, value = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        answer = attended(query, key, value, shown)
        text, image = answer.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class QwenImage(Prompted):
    """Joint blocks of text and image tokens."""

    network: ClassVar[str] = "QwenImageTransformer2DModel"
    pipeline: ClassVar[str] = "QwenImagePipeline"
    interface: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "patch_size",
    )
    options: ClassVar[dict[str, Any]] = {"negative_prompt": ""}
    guidance_word: ClassVar[str] = "true_cfg_scale"
    guidance: ClassVar[float] = 4.0
    image_stream: ClassVar[int] = 1
    even_levels: ClassVar[bool] = True

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        answer = network(
            packed(x),
            encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
            encoder_hidden_states_mask=cond["prompt_mask"],
            timestep=time / 1000,
            img_shapes=[[(1, x.shape[2] // PATCH, x.shape[3] // PATCH)]],  # of the batch: one is read
        )
        return unpacked(answer.sample, x)

    def export(self, network: Any, image: ImageSpec, cond: CondSpec) -> None:
        sides = [[(1, image.height // PATCH, image.width // PATCH)]]
        places = network.pos_embed(sides, device=torch.device("cpu"), max_txt_seq_len=cond.max_tokens)
        network.pos_embed = _Positions(image=places[0], text=places[1])
        for block in network.transformer_blocks:
            block.attn.processor = _RealAttention()

    def as_map(self, network: Any, feature: Any, x: Tensor) -> Tensor:
        return token_map(feature[self.image_stream], x, PATCH)

    def channels(self, config: Any) -> tuple[int, int]:
        return config.in_channels // 4, config.out_channels

    def size(self, path: Path, config: Any) -> tuple[int, int]:
        return SIDE, SIDE

    def patch(self, config: Any) -> int:
        return PATCH

    def plain_latents(self, image: ImageSpec) -> list[str]:
        return packing_code(image)

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        return super().cond(config, text).model_copy(update={"guidance_rule": "patch_norm"})

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        return QwenImageText(
            {
                "tokenizer": load_tokenizer(folder / "tokenizer", "Qwen2Tokenizer"),
                "text_encoder": load_text_model(
                    folder / "text_encoder", "Qwen2_5_VLForConditionalGeneration"
                ),
            }
        )

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        check_width(path, config, "joint_attention_dim", text.embed_dim)

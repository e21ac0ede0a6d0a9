"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): CLIP-L, CLIP-G and T5 prompts, a flow of latents.

Without T5 in the folder, as smaller downloads are, zeros stand where its tokens would.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_core.artifacts import ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.method import Cond
from distill_core.networks.families.base import refuse_steering
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text_parts import load_text_model, load_tokenizer

T5_TOKENS = 256  # that the pipeline reads by default


class SD3Text(PromptEncoder):
    """Penultimate states of both CLIP models side by side, widened with zeros, and T5's last states behind.

    `pooled_embeds` are the two projected prompts side by side. No mask: what pads a prompt is read too.
    """

    def __init__(self, parts: Mapping[str, Any], width: int) -> None:
        self.width = width  # D, the network's
        self.clip_tokens = int(parts["tokenizer"].model_max_length)
        self.max_tokens = self.clip_tokens + T5_TOKENS
        clips = parts["text_encoder"], parts["text_encoder_2"]
        self.pooled_dim = sum(int(model.config.projection_dim) for model in clips)
        super().__init__(parts)

    @property
    def embed_dim(self) -> int:
        return self.width

    @property
    def limits(self) -> dict[str, int]:
        clip = {"tokenizer": self.clip_tokens, "tokenizer_2": self.clip_tokens}
        return clip | ({"tokenizer_3": T5_TOKENS} if "tokenizer_3" in self.parts else {})

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        return tuple(self._read(name, length) for name, length in self.limits.items())

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        clips = [
            self.parts[f"text_encoder{end}"](tokens[f"input_ids{end}"], output_hidden_states=True)
            for end in ("", "_2")
        ]
        both = torch.cat([answer.hidden_states[-2] for answer in clips], dim=-1)
        embeds = torch.cat([pad(both, (0, self.width - both.shape[-1])), self._t5(tokens, both)], dim=-2)
        return {
            "prompt_embeds": embeds,
            "pooled_embeds": torch.cat([answer.text_embeds for answer in clips], dim=-1),
        }

    def _t5(self, tokens: Mapping[str, Tensor], like: Tensor) -> Tensor:
        if "text_encoder_3" not in self.parts:
            return like.new_zeros(like.shape[0], T5_TOKENS, self.width)
        states: Tensor = self.parts["text_encoder_3"](tokens["input_ids_3"])[0]
        return states


class SD3(Prompted):
    """Joint blocks of text and image tokens; patches are made inside."""

    network: ClassVar[str] = "SD3Transformer2DModel"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    index: ClassVar[dict[str, Any]] = {
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    interface: ClassVar[tuple[str, ...]] = (
        *Prompted.interface,
        *("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size", "patch_size"),
    )
    guidance: ClassVar[float] = 7.0
    image_stream: ClassVar[int] = 1

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        prompt, pooled = cond["prompt_embeds"].to(x.dtype), cond["pooled_embeds"].to(x.dtype)
        answer = network(x, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=time)
        output: Tensor = answer.sample
        return output

    def patch(self, config: Any) -> int:
        return int(config.patch_size)

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        parts: dict[str, Any] = {}
        for end in ("", "_2"):
            parts[f"tokenizer{end}"] = load_tokenizer(folder / f"tokenizer{end}")
            name = "CLIPTextModelWithProjection"
            parts[f"text_encoder{end}"] = load_text_model(folder / f"text_encoder{end}", name)
        if (folder / "text_encoder_3").is_dir():
            parts["tokenizer_3"] = load_tokenizer(folder / "tokenizer_3", "T5Tokenizer")
            parts["text_encoder_3"] = load_text_model(folder / "text_encoder_3", "T5EncoderModel")
        return SD3Text(parts, int(config.get("joint_attention_dim", 4096)))

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        t5 = text.parts.get("text_encoder_3")
        widest = sum(text.parts[f"text_encoder{end}"].config.hidden_size for end in ("", "_2"))
        wide = t5.config.d_model if t5 is not None else max(widest, config.joint_attention_dim)
        check_width(path, config, "joint_attention_dim", wide)
        check_width(path, config, "pooled_projection_dim", text.pooled_dim)

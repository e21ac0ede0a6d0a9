"""Sana (Xie et al. 2024, arXiv 2410.10629): masked Gemma prompts behind an instruction, a flow of latents at 1/32.

Sana-Sprint (Chen et al. 2025, arXiv 2503.09641) is its few-step student, told a guidance scale as a number: the
condition `embedded_guidance` (B,). Its trigonometric flow is the plain one: x0 = x_t - t out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.method import Cond
from distill_core.networks.diffusers_words import sana_instruction
from distill_core.networks.families.base import refuse_steering, without_variance
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text_parts import load_text_model, load_tokenizer

TOKENS = 300
EMBEDDED = 4.5  # usual embedded guidance


class SanaText(PromptEncoder):
    """Gemma's last states of the prompt in lower case, and the mask that Gemma is shown too.

    A prompt stands behind the instruction; the first token is kept, and then the last 299, filling included.
    """

    gives_mask = minds_negative = True
    max_tokens = TOKENS

    def __init__(self, parts: Mapping[str, Any]) -> None:
        parts["tokenizer"].padding_side = "right"
        super().__init__(parts)

    @property
    def embed_dim(self) -> int:
        return int(self.parts["text_encoder"].config.hidden_size)

    @property
    def limits(self) -> dict[str, int]:
        return {"tokenizer": TOKENS - 1}  # the instruction's last token may join with the prompt's first

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        before = "" if negative else sana_instruction()
        length = TOKENS if negative else self._instructed + TOKENS - 2
        return (self._read(length=length, masked=True, tidied=True, before=before),)

    @functools.cached_property
    def _instructed(self) -> int:
        return len(self.parts["tokenizer"].encode(sana_instruction()))

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        both = self.parts["text_encoder"](**tokens)[0], tokens["attention_mask"]
        kept = (torch.cat([each[:, :1], each[:, 1 - TOKENS :]], dim=1) for each in both)
        return dict(zip(("prompt_embeds", "prompt_mask"), kept, strict=True))


class Sana(Prompted):
    """Blocks of linear attention that attend to the prompt's tokens."""

    network: ClassVar[str] = "SanaTransformer2DModel"
    pipeline: ClassVar[str] = "SanaPipeline"
    interface: ClassVar[tuple[str, ...]] = (
        *Prompted.interface,
        *(
            "patch_size",
            "caption_channels",
            "interpolation_scale",
            "guidance_embeds",
            "guidance_embeds_scale",
            "timestep_scale",
        ),
    )
    options: ClassVar[dict[str, Any]] = {"use_resolution_binning": False}
    variance_below: ClassVar[bool] = True
    guidance: ClassVar[float] = 4.5

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        config, told = network.config, {"timestep": time * network.config.timestep_scale}
        if config.guidance_embeds:
            guidance = cond["embedded_guidance"] * config.guidance_embeds_scale
            told = {"timestep": time / 1000, "guidance": guidance}
        answer = network(
            x,
            encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
            encoder_attention_mask=cond["prompt_mask"],
            **told,
        )
        return without_variance(answer.sample, x)

    def pipeline_for(self, config: Any, text: PromptEncoder | None) -> str:
        return "SanaSprintPipeline" if config.guidance_embeds else self.pipeline

    def usual_guidance(self, config: Any, text: PromptEncoder | None) -> float:
        return 1.0 if config.guidance_embeds else self.guidance

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        embedded = EMBEDDED if config.guidance_embeds else None
        return super().cond(config, text).model_copy(update={"embedded_guidance": embedded})

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        return SanaText(
            {
                "tokenizer": load_tokenizer(folder / "tokenizer", "GemmaTokenizer"),
                "text_encoder": load_text_model(folder / "text_encoder", "Gemma2Model"),
            }
        )

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        check_width(path, config, "caption_channels", text.embed_dim)

"""UNets of diffusers: of pixels or latents with classes or nothing, and of Stable Diffusion 1.x, 2.x and XL.

A latent consistency model (Luo et al. 2023, arXiv 2310.04378) is told a guidance scale as a number, less one: the
condition `embedded_guidance` (B,).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.errors import ArtifactError
from distill_core.method import Cond
from distill_core.networks.families.base import Family, labelled, refuse_steering, without_variance
from distill_core.networks.foreign.keys import shown
from distill_core.networks.guidance_adapters import told_to_attention
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.steering import make_steerable
from distill_core.networks.text import check_text, text_for
from distill_core.recipe.tables import NetworkConfig

LCM_GUIDANCE = 8.5  # usual scale of latent consistency models, as their pipeline has it; 3 to 13 are meant


def waves(values: Tensor, width: int) -> Tensor:
    """Sines and cosines (B, width) of `values` (B,) at frequencies from 1 down to 1/10,000 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device) / (half - 1))
    angles = values[:, None].float() * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


class UNet2D(Family):
    """A UNet that is told a class, or nothing."""

    network: ClassVar[str] = "UNet2DModel"
    slot: ClassVar[Literal["unet", "transformer"]] = "unet"
    interface: ClassVar[tuple[str, ...]] = (*Family.interface, "num_class_embeds")

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        return without_variance(network(x, time, class_labels=cond.get("class_label")).sample, x)

    def trunk(self, network: Any) -> nn.Module:
        trunk: nn.Module = network.mid_block or network.down_blocks[-1]
        return trunk

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        return labelled(config.get("num_class_embeds"), None)

    def new_args(self, num_classes: int | None, text: PromptEncoder | None) -> dict[str, Any]:
        return {} if num_classes is None else {"num_class_embeds": num_classes + 1}


class UNet2DCondition(UNet2D):
    """A UNet that reads prompts; SDXL's is told the pooled prompt and the picture's size too."""

    network: ClassVar[str] = "UNet2DConditionModel"
    interface: ClassVar[tuple[str, ...]] = (
        *UNet2D.interface,
        *("cross_attention_dim", "encoder_hid_dim", "addition_embed_type", "addition_time_embed_dim"),
        *("projection_class_embeddings_input_dim", "time_cond_proj_dim"),
    )

    guidance: ClassVar[float] = 7.5
    steerable: ClassVar[bool] = True

    def prepare(self, network: Any) -> None:
        make_steerable(network)

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        extras = told_to_attention(cond)
        if "pooled_embeds" in cond:
            _, height, width = image.picture
            size = x.new_tensor([height, width, 0, 0, height, width])  # original size, crop's corner, size
            pooled = cond["pooled_embeds"].to(x.dtype)
            extras["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size.expand(x.shape[0], -1)}
        if "class_label" in cond:  # the further scalars of `networks.scalar_conditions`
            extras["class_labels"] = cond["class_label"]
        width = network.config.time_cond_proj_dim
        if width is not None:
            embedded = waves(1000 * (cond["embedded_guidance"] - 1), width)
            extras["timestep_cond"] = embedded.to(x.dtype)
        prompt = cond["prompt_embeds"].to(x.dtype)
        return without_variance(network(x, time, encoder_hidden_states=prompt, **extras).sample, x)

    def index_of(self, pipeline: str) -> dict[str, Any]:
        if pipeline == "StableDiffusionPipeline":
            return {
                "safety_checker": [None, None],
                "feature_extractor": [None, None],
                "requires_safety_checker": False,
            }
        if pipeline == "StableDiffusionXLPipeline":
            return {"image_encoder": [None, None], "feature_extractor": [None, None]}
        return {}

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        check_text(config, text)
        widths = config.cross_attention_dim
        for width in widths if isinstance(widths, list | tuple) else [widths]:
            if width != text.embed_dim:
                raise ArtifactError(
                    f"{path} says cross_attention_dim = {shown(widths)}, and prompts are encoded {text.embed_dim} wide"
                )

    def cond(self, config: Any, text: PromptEncoder | None) -> CondSpec:
        if text is None:
            raise ArtifactError("this network is conditioned on text, and its folder has no text_encoder/")
        embedded = None if config.time_cond_proj_dim is None else LCM_GUIDANCE
        return text.cond().model_copy(update={"embedded_guidance": embedded})

    def usual_guidance(self, config: Any, text: PromptEncoder | None) -> float:
        return self.guidance if config.time_cond_proj_dim is None else 1.0

    def new_text(self, network: NetworkConfig, prompts: list[str] | None) -> PromptEncoder:
        return text_for(network, prompts)

    def new_args(self, num_classes: int | None, text: PromptEncoder | None) -> dict[str, Any]:
        assert text is not None
        return {"cross_attention_dim": text.embed_dim}

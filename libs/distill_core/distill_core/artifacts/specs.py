"""Facts that cards of several kinds share: pictures, conditions, scenes. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_core.config import Config
from distill_core.signature import MAX_VALUES

Side = Annotated[int, Field(ge=1, le=2**16)]


class ImageSpec(Config):
    """Output of a generator: the denoiser's own tensor, and the image after decoding."""

    channels: Side  # of the denoiser's tensor: pixels, or latents
    height: Side
    width: Side
    picture: tuple[Side, Side, Side]  # (C, H, W) in [-1, 1] after the decoder; the same for a pixel model
    tileable: bool = False  # pictures repeat without a seam: the network's convolutions wrap around

    @model_validator(mode="after")
    def _fits(self) -> ImageSpec:
        if max(self.channels * self.height * self.width, math.prod(self.picture)) > MAX_VALUES:
            raise ValueError(f"a picture of more than {MAX_VALUES} values is not allowed")
        return self


class CondSpec(Config):
    """Condition of a generator."""

    kind: Literal["none", "class_label", "prompt", "low_resolution"]
    num_classes: int | None = None
    null_label: int | None = None  # the class index that means "no condition"
    class_names: tuple[str, ...] = ()
    max_tokens: int | None = None  # prompt: tokens, longer prompts are cut by the tokenizer
    embed_dim: int | None = None  # prompt: width of prompt_embeds
    pooled_dim: int | None = None  # prompt: width of pooled_embeds, for models that take them (SDXL)
    masked: bool = False  # prompt: whether prompt_mask (T,) says which tokens are there
    guidance_rule: Literal["linear", "patch_norm"] = "linear"  # see `diffusion.guidance.guide_by`
    embedded_guidance: float | None = None  # usual value of the guidance that the network is told as a number
    nasa_scale: float | None = (
        None  # prompt: usual strength of a negative prompt in attention; unset: in guidance
    )
    examples: tuple[str, ...] = ()  # prompt: some that the model was trained on, for previews
    factor: int | None = Field(
        None, ge=2, le=256
    )  # low_resolution: a side of the picture over one of the small

    @model_validator(mode="after")
    def _enlarges(self) -> CondSpec:
        if (self.kind == "low_resolution") != (self.factor is not None):
            raise ValueError(
                "a model that enlarges has the condition low_resolution and a factor, others neither"
            )
        return self


class SceneSpec(Config):
    """Scene of a radiance field: its box and cameras' usual place, in the scene's own units."""

    field: str
    bound: float = Field(gt=0)
    radius: float = Field(gt=0)  # usual camera distance from the centre
    fov_degrees: float = Field(40.0, gt=0, lt=180)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    transform: tuple[float, ...] | None = Field(
        None, min_length=16, max_length=16
    )  # from the capture's world into the scene's, 4x4 row by row; None: they are the same

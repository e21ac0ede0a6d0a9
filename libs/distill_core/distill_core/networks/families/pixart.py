"""PixArt-alpha and Sigma (Chen et al. 2023, arXiv 2310.00426): masked T5 prompts, noise of latents.

The alpha network of 1024 pixels is told the picture's size and its sides' ratio too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from distill_core.artifacts import ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.method import Cond
from distill_core.networks.families.base import refuse_steering, without_variance
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.foreign.index import pipeline_of
from distill_core.networks.guidance_adapters import told_to_attention
from distill_core.networks.prompts import PromptEncoder
from distill_core.networks.text_parts import load_text_model, load_tokenizer

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # that the pipelines read by default


class PixArtText(PromptEncoder):
    """T5's last states of the prompt in lower case, with the mask that T5 is shown too."""

    gives_mask = True

    def __init__(self, parts: Mapping[str, Any], tokens: int) -> None:
        self.max_tokens = tokens
        super().__init__(parts)

    @property
    def embed_dim(self) -> int:
        return int(self.parts["text_encoder"].config.d_model)

    def read_tokens(self, count: int) -> None:
        self.max_tokens = count

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        return (self._read(masked=True, tidied=True),)

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        states = self.parts["text_encoder"](**tokens)[0]
        return {"prompt_embeds": states, "prompt_mask": tokens["attention_mask"]}


class PixArt(Prompted):
    """Blocks of image tokens that attend to the prompt's."""

    network: ClassVar[str] = "PixArtTransformer2DModel"
    pipeline: ClassVar[str] = "PixArtSigmaPipeline"
    interface: ClassVar[tuple[str, ...]] = (
        *Prompted.interface,
        *("patch_size", "caption_channels", "use_additional_conditions", "interpolation_scale"),
    )
    options: ClassVar[dict[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}
    variance_below: ClassVar[bool] = True
    guidance: ClassVar[float] = 4.5

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        answer = network(
            x,
            encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
            encoder_attention_mask=cond["prompt_mask"],
            timestep=time,
            added_cond_kwargs=_size(x, image) if network.use_additional_conditions else _NO_SIZE,
            **told_to_attention(cond),
        )
        return without_variance(answer.sample, x)

    def pipeline_for(self, config: Any, text: PromptEncoder | None) -> str:
        alpha = text is not None and text.max_tokens == TOKENS["PixArtAlphaPipeline"]
        return "PixArtAlphaPipeline" if alpha else "PixArtSigmaPipeline"

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        parts = {
            "tokenizer": load_tokenizer(folder / "tokenizer", "T5Tokenizer"),
            "text_encoder": load_text_model(folder / "text_encoder", "T5EncoderModel"),
        }
        return PixArtText(parts, TOKENS.get(pipeline_of(folder) or "", TOKENS["PixArtSigmaPipeline"]))

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        check_width(path, config, "caption_channels", text.embed_dim)


_NO_SIZE = {"resolution": None, "aspect_ratio": None}


def _size(x: Tensor, image: ImageSpec) -> dict[str, Tensor]:
    """Height and width (B, 2) of the pictures in pixels, and their ratio (B, 1)."""
    _, height, width = image.picture
    size, ratio = x.new_tensor([[height, width]]), x.new_tensor([[height / width]])
    return {"resolution": size.expand(x.shape[0], -1), "aspect_ratio": ratio.expand(x.shape[0], -1)}

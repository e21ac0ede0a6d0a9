"""Z-Image (Cai et al. 2025, arXiv 2511.22699): Qwen3 prompts in a chat, a flow of latents told 1 - t, answering -v.

Its pipeline's guidance g is cond + g (cond - null): ours is 1 + g. Turbo, the distilled one, has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill_core.artifacts import ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.method import Cond
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.families.base import refuse_steering, token_map
from distill_core.networks.families.flux import PATCH, SIDE
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.prompts import PromptEncoder, chatted, filled
from distill_core.networks.text_parts import load_text_model, load_tokenizer

TOKENS = 512


class ZImageText(PromptEncoder):
    """The hidden states before the last ones, of the prompt as a user's message; as many as it has tokens."""

    gives_mask = True
    max_tokens = TOKENS

    @property
    def embed_dim(self) -> int:
        return int(self.parts["text_encoder"].config.hidden_size)

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        words = chatted(self.parts["tokenizer"], thinking=True)
        return (self._read(masked=True, filled=False, **words),)

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        answer = self.parts["text_encoder"](**tokens, output_hidden_states=True)
        return filled(answer.hidden_states[-2], tokens["attention_mask"], TOKENS)


class ZImage(Prompted):
    """Blocks over the image's tokens and then the prompt's; places of both depend on how many the prompt has."""

    network: ClassVar[str] = "ZImageTransformer2DModel"
    pipeline: ClassVar[str] = "ZImagePipeline"
    interface: ClassVar[tuple[str, ...]] = ("in_channels", "cap_feat_dim", "t_scale", "axes_lens")
    guidance: ClassVar[float] = 6.0
    even_levels: ClassVar[bool] = True

    def call(self, network: Any, x: Tensor, time: Tensor, cond: Cond, image: ImageSpec) -> Tensor:
        refuse_steering(cond, self.network)
        prompt, mask = cond["prompt_embeds"].to(x.dtype), cond["prompt_mask"]
        counts = [prompt.shape[1]] * len(x) if is_faked() else mask.sum(1).tolist()  # a plan has no values
        prompts = [states[:count] for states, count in zip(prompt, counts, strict=True)]
        told = {"t": 1 - time / 1000, "cap_feats": prompts, "return_dict": False}
        answers = network(list(x[:, :, None]), **told)[0]
        return -torch.stack(list(answers))[:, :, 0]

    def trunk(self, network: Any) -> nn.Module:
        blocks: nn.ModuleList = network.layers
        return blocks[len(blocks) // 2]

    def as_map(self, network: Any, feature: Any, x: Tensor) -> Tensor:
        return token_map(feature[:, : x.shape[2] * x.shape[3] // PATCH**2], x, PATCH)

    def channels(self, config: Any) -> tuple[int, int]:
        return config.in_channels, config.in_channels

    def size(self, path: Path, config: Any) -> tuple[int, int]:
        return SIDE, SIDE

    def patch(self, config: Any) -> int:
        return PATCH

    def plain_guidance(self, guidance: float) -> float:
        return guidance - 1

    def read_text(self, folder: Path, config: Mapping[str, Any]) -> PromptEncoder:
        return ZImageText(
            {
                "tokenizer": load_tokenizer(folder / "tokenizer", "Qwen2Tokenizer"),
                "text_encoder": load_text_model(folder / "text_encoder", "Qwen3Model"),
            }
        )

    def check_text(self, path: Path, config: Any, text: PromptEncoder) -> None:
        check_width(path, config, "cap_feat_dim", text.embed_dim)

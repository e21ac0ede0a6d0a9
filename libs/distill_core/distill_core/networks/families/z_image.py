"""Z-Image (Cai et al. 2025, arXiv 2511.22699): Qwen3 prompts in a chat, a flow of latents told 1 - t, answering -v.

Its pipeline's guidance g is cond + g (cond - null): ours is 1 + g. Turbo, the distilled one, has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill_core.artifacts import CondSpec, ImageSpec
from distill_core.artifacts.prompt_reading import TokenInput
from distill_core.method import Cond
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.families.base import refuse_steering, token_map
from distill_core.networks.families.flux import PATCH, SIDE
from distill_core.networks.families.prompted import Prompted, check_width
from distill_core.networks.prompts import PromptEncoder, chatted, filled
from distill_core.networks.rotation import Rotation, attended, projected, rotated
from distill_core.networks.text_parts import load_text_model, load_tokenizer

TOKENS = 512
AXES = ("prompt", "row", "column")  # of positions
MULTIPLE = 32  # of tokens, which a prompt and a picture are filled up to each


class ZImageText(PromptEncoder):
    """The hidden states before the last ones, of the prompt as a user's message; as many as it has tokens."""

    gives_mask = True
    max_tokens = TOKENS

    @property
    def embed_dim(self) -> int:
        return int(self.parts["text_encoder"].config.hidden_size)

    def reads(self, negative: bool = False) -> tuple[TokenInput, ...]:
        words: dict[str, Any] = chatted(self.parts["tokenizer"], thinking=True)
        return (self._read(masked=True, filled=False, **words),)

    def conditions(self, tokens: Mapping[str, Tensor]) -> Cond:
        answer = self.parts["text_encoder"](**tokens, output_hidden_states=True)
        return filled(answer.hidden_states[-2], tokens["attention_mask"], TOKENS)


class _RealAttention:
    """Attention of tokens whose positions are real numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: Tensor | None,
        freqs_cis: Tensor,
    ) -> Tensor:
        query, key, value = projected(attn, hidden_states)
        both = rotated(query, freqs_cis), rotated(key, freqs_cis)
        answer: Tensor = attn.to_out[0](attended(*both, value, attention_mask))
        return answer


def _masked_answer(network: Any, x: Tensor, time: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    """What the network answers (B, C, h, w) to prompts (B, T, D) that all have T tokens, some masked.

    Its own form takes lists of prompts as long as they are. Each is filled up to a multiple of tokens by a learned
    one, and the picture's positions begin behind; T is such a multiple.
    """
    told, order = (
        network.t_embedder(time * network.t_scale).type_as(x),
        torch.arange(mask.shape[1], device=x.device),
    )
    order = order.expand(x.shape[0], -1)
    count = mask.sum(1, keepdim=True)
    filled_up = (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE  # (B, 1)
    text = torch.where((order < count)[:, :, None], network.cap_embedder(prompt), network.cap_pad_token)
    text_shown, text_turn = order < filled_up, _turn(network, 1 + order, 0 * order, 0 * order)
    for layer in network.context_refiner:
        text = layer(text, text_shown, text_turn)

    patches = (
        x.unflatten(3, (-1, PATCH))
        .unflatten(2, (-1, PATCH))
        .permute(0, 2, 4, 3, 5, 1)
        .flatten(3)
        .flatten(1, 2)
    )
    lacking = -patches.shape[1] % MULTIPLE
    tokens = network.all_x_embedder[f"{PATCH}-1"](patches)
    rest = network.x_pad_token.expand(x.shape[0], lacking, -1)
    image, width = torch.cat([tokens, rest], dim=1), x.shape[3] // PATCH
    place = torch.arange(patches.shape[1], device=x.device).expand(x.shape[0], -1)
    axes = filled_up + 1 + 0 * place, place // width, place % width
    image_turn = _turn(network, *(pad(axis, (0, lacking)) for axis in axes))
    for layer in network.noise_refiner:
        image = layer(image, None, image_turn, told)

    both, turn = torch.cat([image, text], dim=1), torch.cat([image_turn, text_turn], dim=2)
    shown = torch.cat([torch.ones_like(image[:, :, 0], dtype=torch.bool), text_shown], dim=1)
    for layer in network.layers:
        both = layer(both, shown, turn, told)
    answer = network.all_final_layer[f"{PATCH}-1"](both, c=told)[:, : patches.shape[1]]
    grid = answer.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (-1, width))  # (B, h/2, w/2, 2, 2, C)
    made: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return made


def _turn(network: Any, *places: Tensor) -> Tensor:
    """Cosines and sines (2, B, N, d / 2) at places (B, N) along each axis."""
    tables = (getattr(network.rotation, axis) for axis in AXES)
    return torch.cat([table[:, place] for table, place in zip(tables, places, strict=True)], dim=-1)


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
        if hasattr(network, "rotation"):
            return -_masked_answer(network, x, 1 - time / 1000, prompt, mask)
        counts = [prompt.shape[1]] * len(x) if is_faked() else mask.sum(1).tolist()  # a plan has no values
        prompts = [states[:count] for states, count in zip(prompt, counts, strict=True)]
        told = {"t": 1 - time / 1000, "cap_feats": prompts, "return_dict": False}
        answers = network(list(x[:, :, None]), **told)[0]
        return -torch.stack(list(answers))[:, :, 0]

    def export(self, network: Any, image: ImageSpec, cond: CondSpec) -> None:
        rope = network.rope_embedder
        factors = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
        network.rotation = Rotation(**dict(zip(AXES, factors, strict=True)))
        for block in (*network.noise_refiner, *network.context_refiner, *network.layers):
            block.attention.processor = _RealAttention()

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

"""Vision transformers on some of a picture's patches: masks, encoders that stop early, and the decoder of MAE.

    tokens (B, 1 + N, D) -> those of the K kept patches (B, 1 + K, D) -> blocks 1 .. L, or 1 .. l where that is enough

A mask is drawn for each picture by itself. Two networks are shown the same patches by being given the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill_core.errors import ConfigError
from distill_core.networks.taps import tapping
from distill_core.networks.vision import VisionNetwork

PROJECTIONS = ("queries", "keys", "values")


@dataclass(frozen=True)
class TokenMask:
    """Which of a picture's N patches are seen."""

    kept: Tensor  # (B, K) int64, places of the seen patches, in the order in which an encoder is given them
    restore: Tensor  # (B, N) int64, where each patch stands in the list of seen patches, then of hidden ones

    @property
    def hidden(self) -> Tensor:
        """(B, N) True where a patch is not seen."""
        return self.restore >= self.kept.shape[1]

    def select(self, tokens: Tensor) -> Tensor:
        """Those of tokens (B, P + N, D) that are seen; the P before the patches always are."""
        prefix = tokens.shape[1] - self.restore.shape[1]
        patches = tokens[:, prefix:].gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :prefix], patches], dim=1)


def mask_of(noise: Tensor, ratio: float) -> TokenMask:
    """The mask that hides the share `ratio` of the patches, those with the highest of `noise` (B, N).

    At least one patch is seen. The number of seen ones is N (1 - ratio), rounded down.
    """
    order = noise.argsort(dim=1)
    count = max(int(noise.shape[1] * (1 - ratio) + 1e-6), 1)
    return TokenMask(order[:, :count], order.argsort(dim=1))


def random_mask(encoder: MaskedEncoder, image: Tensor, ratio: float) -> TokenMask:
    """A mask for each of the pictures, of torch's global generator."""
    return mask_of(torch.rand(len(image), encoder.num_patches, device=image.device), ratio)


class MaskedEncoder:
    """The encoder of a ViT, DeiT or masked autoencoder, on the patches of a mask.

    It holds the network and is no module itself, so that weights have one name each.

    Raises:
        ConfigError: a model of another architecture; `owner` is what the sentence calls it.
    """

    def __init__(self, model: nn.Module, owner: str, *, field: str) -> None:
        network = getattr(model, "network", model)
        base: Any = network.model.base_model if isinstance(network, VisionNetwork) else None
        if not (hasattr(base, "embeddings") and hasattr(base, "layers") and hasattr(base, "layernorm")):
            name = type(network).__name__
            raise ConfigError(
                f"{owner} is a {name}, and masks need a vision transformer; choose a ViT, DeiT or ViTMAE network",
                field=field,
            )
        self.field = field
        self.network = cast(VisionNetwork, network)
        self.base = base
        self.num_patches = int(base.embeddings.patch_embeddings.num_patches)
        self.width = int(base.config.hidden_size)
        self.patch_size = int(base.config.patch_size)
        self.num_layers = len(base.layers)
        self.num_heads = int(base.config.num_attention_heads)

    def pixels(self, image: Tensor) -> Tensor:
        """Pictures as the network sees them."""
        seen: Tensor = self.network.preprocess(image)
        return seen

    def tokens(self, image: Tensor) -> Tensor:
        """(B, P + N, D) tokens of pictures, with their places, before the first block."""
        pixels = self.pixels(image)
        in_order = getattr(self.network, "in_order", None)
        if in_order is None:
            tokens: Tensor = self.base.embeddings(pixels)
        else:
            tokens = self.base.embeddings(pixels, noise=in_order(len(pixels)))[0]
        return tokens

    def __call__(self, image: Tensor, mask: TokenMask | None = None, until: int | None = None) -> Tensor:
        """(B, P + K, D) after block `until` of 1 to L, and no later one is run; unset: after the last, normed.

        Without a mask all patches are seen.
        """
        hidden = self.entering(image, mask)
        for layer in self.base.layers[:until]:
            hidden = layer(hidden)
        if until is None:
            hidden = self.base.layernorm(hidden)
        return hidden

    def with_middle(self, image: Tensor, mask: TokenMask, block: int) -> tuple[Tensor, Tensor]:
        """(B, P + K, D) after the last block, normed, and after `block`, counted from 1, as it is."""
        hidden = middle = self.entering(image, mask)
        for number, layer in enumerate(self.base.layers, start=1):
            hidden = layer(hidden)
            if number == block:
                middle = hidden
        return self.base.layernorm(hidden), middle

    def entering(self, image: Tensor, mask: TokenMask | None) -> Tensor:
        """(B, P + K, D) seen tokens before the first block."""
        tokens = self.tokens(image)
        return tokens if mask is None else mask.select(tokens)

    def with_projections(
        self, image: Tensor, mask: TokenMask | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the encoder gives (B, P + K, D), and queries, keys and values (B, P + K, D) of its last block."""
        paths = {name: f"layers.{self.num_layers - 1}.attention.{name[0]}_proj" for name in PROJECTIONS}
        with tapping(self.base, tuple(paths.values()), field=self.field) as found:
            hidden = self(image, mask)
        return hidden, {name: found[path] for name, path in paths.items()}

    def with_prefixes(self, tokens: Tensor, count: int) -> Tensor:
        """Tokens (B, P + K, D) with no more than the last `count` before those of the patches."""
        return tokens[:, self.prefixes - count :]

    def check_heads(self, count: int, *, field: str) -> None:
        """Refuse a number of heads into which the width does not divide.

        Raises:
            ConfigError: it does not.
        """
        if self.width % count:
            raise ConfigError(
                f"{field} is {count}, and tokens of {self.width} values do not divide into so many; choose a divisor",
                field=field,
            )

    @property
    def prefixes(self) -> int:
        """Tokens before those of the patches: 1, or 2 with a distillation token."""
        return int(self.base.embeddings.position_embeddings.shape[1]) - self.num_patches


def check_same_patches(student: MaskedEncoder, teacher: MaskedEncoder, *, field: str) -> None:
    """Refuse a teacher whose patches are not the student's.

    Raises:
        ConfigError: they are not.
    """
    if student.num_patches != teacher.num_patches:
        raise ConfigError(
            f"the student cuts a picture into {student.num_patches} patches and the teacher into "
            f"{teacher.num_patches}; choose the network.args.patch_size that gives as many",
            field=field,
        )


def aligned(
    encoder: MaskedEncoder, tokens: Tensor, other: MaskedEncoder, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens of two encoders with as many before those of the patches, where one has a distillation token too."""
    count = min(encoder.prefixes, other.prefixes)
    return encoder.with_prefixes(tokens, count), other.with_prefixes(others, count)


def new_decoder(encoder: MaskedEncoder, width: int, num_layers: int) -> nn.Module:
    """A fresh decoder of MAE for what an encoder gives, with four heads; it leads to the pixels of every patch.

    Raises:
        ConfigError: pictures that are not square, or a width that four heads and the places do not divide.
    """
    from distill_core.networks.predictors.vit import MAEArgs, ViTMAEForPreTraining

    args = encoder.network.args
    whole = ViTMAEForPreTraining(
        MAEArgs.parse(
            {
                "shape": args.shape,
                "preprocessing": args.preprocessing.model_dump(),
                "patch_size": encoder.patch_size,
                "hidden_size": encoder.width,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 1,
                "decoder_hidden_size": width,
                "decoder_num_hidden_layers": num_layers,
                "decoder_intermediate_size": 2 * width,
            },
            where="config.decoder",
        )
    )
    decoder: nn.Module = whole.model.decoder
    return decoder


def patches_of(pixels: Tensor, size: int) -> Tensor:
    """(B, N, size * size * C) pixels of each patch of (B, C, H, W), rows first, channels last in a pixel."""
    b, c, h, w = pixels.shape
    cells = pixels.reshape(b, c, h // size, size, w // size, size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // size) * (w // size), size * size * c)


def hidden_pixel_loss(predicted: Tensor, pixels: Tensor, mask: TokenMask, patch_size: int) -> Tensor:
    """(B,) mean squared error over the pixels of the patches that were not seen. He et al. 2022, section 3.

    `predicted` (B, N, P) are all patches of pictures (B, C, H, W).
    """
    error = (predicted - patches_of(pixels, patch_size)).square().mean(2)
    hidden = mask.hidden
    return (error * hidden).sum(1) / hidden.sum(1).clamp(min=1)

"""Vision transformers: classifiers, DeiT with its distillation token, and the encoders of MAE and CLIP."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.networks.foreign.keys import names
from distill_core.networks.vision import (
    Activation,
    ClassifierArgs,
    Count,
    Positive,
    Rate,
    VisionArgs,
    VisionNetwork,
    Width,
    check_heads,
)
from distill_core.signature import TensorSpec


class PatchArgs(VisionArgs):
    """What decides a transformer over patches of a picture."""

    patch_size: int = Field(4, ge=1, le=256)  # pixels
    hidden_size: Width = 64
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 4
    intermediate_size: Width = 128
    hidden_act: Activation = "gelu"
    layer_norm_eps: Positive = 1e-12

    @model_validator(mode="after")
    def _patches_fill(self) -> Self:
        self.divides("patches", self.patch_size)
        check_heads([self.hidden_size], [self.num_attention_heads])
        return self


class EncoderArgs(PatchArgs):
    """What decides the encoder of a vision transformer."""

    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    qkv_bias: bool = True


def check_places(key: str, width: int) -> None:
    """Refuse a width that does not hold sines and cosines of two coordinates.

    Raises:
        ValueError: it does not.
    """
    if width % 4:
        raise ValueError(
            f"{key} = {width} is not allowed: sines and cosines of two coordinates need a multiple of 4"
        )


class ViTArgs(EncoderArgs, ClassifierArgs):
    """What decides the shape of a ViT or DeiT."""


class ViTForImageClassification(VisionNetwork):
    """ViT (Dosovitskiy et al. 2021): pictures (B, C, H, W) in [-1, 1] -> logits (B, K)."""

    Args = ViTArgs
    model_type = "vit"
    idle = frozenset({"encoder_stride", "pooler_act", "pooler_output_size"})  # of heads that it has not
    sized = True


class DeiTForImageClassification(ViTForImageClassification):
    """DeiT (Touvron et al. 2021) without its distillation head: pictures -> logits (B, K)."""

    model_type = "deit"


class DeiTForImageClassificationWithTeacher(DeiTForImageClassification):
    """DeiT with its distillation token: pictures -> the mean of the logits of both heads (B, K)."""

    def heads(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) of the class token, and of the token that learns from a teacher."""
        out = self.model(pixel_values=self.preprocess(image))
        return out.cls_logits, out.distillation_logits


class MAEEncoderArgs(EncoderArgs):
    """What decides the encoder of a masked autoencoder."""

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        check_places("hidden_size", self.hidden_size)
        return self


class ViTMAEModel(VisionNetwork):
    """Encoder of a masked autoencoder (He et al. 2022), which sees the whole picture -> embedding (B, D)."""

    Args = MAEEncoderArgs
    model_type = "vit_mae"
    idle = names(
        """
        mask_ratio norm_pix_loss decoder_hidden_size decoder_intermediate_size decoder_num_attention_heads
        decoder_num_hidden_layers
        """
    )  # of its training
    sized = True

    def __init__(self, args: VisionArgs) -> None:
        super().__init__(args)
        assert isinstance(args, EncoderArgs)
        self.place(self.model.base_model.embeddings.position_embeddings, args)

    @torch.no_grad()
    def place(self, positions: Tensor, args: EncoderArgs) -> None:
        """Write the fixed sines and cosines of each patch's place into positions (1, 1 + N, D).

        A model of transformers without a file has zeros there, which no training changes.
        """
        from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

        height, width = (side // args.patch_size for side in args.size)
        rows, columns = build_2d_sinusoidal_position_embedding(
            height, width, positions.shape[-1], cls_token=True
        ).chunk(2, dim=1)
        positions.copy_(torch.cat([columns, rows], dim=1))  # the order of published weights

    @classmethod
    def config(cls, args: VisionArgs) -> dict[str, Any]:
        return {**super().config(args), "mask_ratio": 0.0}

    def forward(self, image: Tensor) -> Tensor:
        pixels = self.preprocess(image)
        encoder = self.model.base_model
        out: Tensor = encoder(pixel_values=pixels, noise=self.in_order(len(pixels))).last_hidden_state[:, 0]
        return out

    def in_order(self, count: int) -> Tensor:
        """What patches are sorted by (B, N): they stay where they are."""
        assert isinstance(self.args, EncoderArgs)
        height, width = (side // self.args.patch_size for side in self.args.size)
        device = next(self.parameters()).device
        return torch.arange(height * width, device=device, dtype=torch.float32).expand(count, -1)

    def outputs(self) -> dict[str, TensorSpec]:
        assert isinstance(self.args, EncoderArgs)
        return {"embedding": TensorSpec(dtype="float32", shape=(self.args.hidden_size,))}


class MAEArgs(MAEEncoderArgs):
    """What decides a masked autoencoder."""

    decoder_hidden_size: Width = 32  # values of a token in the decoder
    decoder_num_hidden_layers: Count = 2  # blocks of the decoder
    decoder_num_attention_heads: Count = 4  # attention heads of each of these
    decoder_intermediate_size: Width = 64  # values inside the perceptron of each of these

    @model_validator(mode="after")
    def _decoder_fits(self) -> Self:
        check_heads([self.decoder_hidden_size], [self.decoder_num_attention_heads])
        check_places("decoder_hidden_size", self.decoder_hidden_size)
        if self.size[0] != self.size[1]:
            raise ValueError(
                f"a masked autoencoder takes square pictures, and these are {self.size[1]} x {self.size[0]}"
            )
        return self


class ViTMAEForPreTraining(ViTMAEModel):
    """A masked autoencoder (He et al. 2022) with its decoder, which `predict` does not run -> embedding (B, D)."""

    Args = MAEArgs
    idle = frozenset({"mask_ratio", "norm_pix_loss"})  # of its training

    def __init__(self, args: VisionArgs) -> None:
        super().__init__(args)
        assert isinstance(args, MAEArgs)
        self.place(self.model.decoder.decoder_pos_embed, args)
        deviation = self.model.config.initializer_range
        for token in (self.model.vit.embeddings.cls_token, self.model.decoder.mask_token):
            nn.init.normal_(token, std=deviation)  # zeros in transformers


class CLIPVisionArgs(PatchArgs):
    """What decides the picture tower of CLIP."""

    projection_dim: Width = 64  # of the embedding
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Positive = 1e-5
    attention_dropout: Rate = 0.0

    @model_validator(mode="after")
    def _square(self) -> Self:
        if self.size[0] != self.size[1]:
            raise ValueError(f"CLIP takes square pictures, and these are {self.size[1]} x {self.size[0]}")
        return self


class CLIPVisionModelWithProjection(VisionNetwork):
    """Picture tower of CLIP (Radford et al. 2021): pictures -> embedding (B, D), not of unit length."""

    Args = CLIPVisionArgs
    model_type = "clip_vision_model"
    idle = frozenset({"initializer_factor"})
    sized = True

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.model(pixel_values=self.preprocess(image)).image_embeds
        return out

    def outputs(self) -> dict[str, TensorSpec]:
        assert isinstance(self.args, CLIPVisionArgs)
        return {"embedding": TensorSpec(dtype="float32", shape=(self.args.projection_dim,))}


NETWORKS = {
    cls.__name__: cls
    for cls in (
        ViTForImageClassification,
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
        ViTMAEModel,
        ViTMAEForPreTraining,
        CLIPVisionModelWithProjection,
    )
}

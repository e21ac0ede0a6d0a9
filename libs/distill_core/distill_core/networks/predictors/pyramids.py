"""Transformers over patches of growing size: PVT, PVT v2, Swin, SegFormer."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from distill_core.networks.vision import (
    BACKBONE,
    Activation,
    ClassifierArgs,
    Counts,
    Positive,
    Rate,
    Ratios,
    Sizes,
    VisionArgs,
    VisionNetwork,
    Width,
    Widths,
    check_heads,
)
from distill_core.signature import TensorSpec


class PyramidArgs(ClassifierArgs):
    """What decides the stages of a pyramid."""

    hidden_sizes: Widths = (16, 32, 64, 64)  # channels by stage
    depths: Counts = (1, 1, 1, 1)  # layers by stage
    strides: Sizes = (4, 2, 2, 2)
    num_attention_heads: Counts = (1, 2, 4, 4)
    mlp_ratios: Ratios = (4, 4, 4, 4)
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    drop_path_rate: Rate = 0.0
    layer_norm_eps: Positive = 1e-6

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.hidden_sizes, self.num_attention_heads)
        return self


class PvtArgs(PyramidArgs):
    """What decides the shape of a PVT."""

    patch_sizes: Sizes = (4, 2, 2, 2)  # pixels, then patches of the stage before
    sequence_reduction_ratios: Sizes = (8, 4, 2, 1)
    qkv_bias: bool = True

    @model_validator(mode="after")
    def _square(self) -> Self:
        if self.size[0] != self.size[1]:
            raise ValueError(f"PVT takes square pictures, and these are {self.size[1]} x {self.size[0]}")
        return self


class Pyramid(VisionNetwork):
    """Base of the networks whose config counts its stages."""

    @classmethod
    def config(cls, args: VisionArgs) -> dict[str, Any]:
        assert isinstance(args, PyramidArgs)
        found = super().config(args)
        ratios = [int(ratio) if ratio == int(ratio) else ratio for ratio in args.mlp_ratios]
        return {**found, "num_encoder_blocks": len(args.depths), "mlp_ratios": ratios}


class PvtForImageClassification(Pyramid):
    """PVT (Wang et al. 2021): square pictures (B, C, H, H) in [-1, 1] -> logits (B, K)."""

    Args = PvtArgs
    model_type = "pvt"
    sized = True


class OverlapArgs(PyramidArgs):
    """What decides a pyramid of patches that overlap."""

    patch_sizes: Sizes = (7, 3, 3, 3)  # pixels, then patches of the stage before
    sr_ratios: Sizes = (8, 4, 2, 1)  # of keys and values


class PvtV2Args(OverlapArgs):
    """What decides the shape of a PVT v2."""

    qkv_bias: bool = True
    linear_attention: bool = False  # True: keys and values are pooled to 7 x 7, and sr_ratios do nothing


class PvtV2ForImageClassification(Pyramid):
    """PVT v2 (Wang et al. 2022): pictures -> logits (B, K)."""

    Args = PvtV2Args
    model_type = "pvt_v2"
    idle = BACKBONE


class SegformerArgs(OverlapArgs):
    """What decides the shape of a SegFormer."""

    decoder_hidden_size: Width = 32
    classifier_dropout_prob: Rate = 0.1


class SegformerForSemanticSegmentation(Pyramid):
    """SegFormer (Xie et al. 2021): pictures -> logits of the class of each 4 x 4 pixels (B, K, H / 4, W / 4)."""

    Args = SegformerArgs
    model_type = "segformer"
    idle = frozenset({"semantic_loss_ignore_index"})

    @classmethod
    def config(cls, args: VisionArgs) -> dict[str, Any]:
        found = super().config(args)
        del found["image_size"]  # it takes any
        return found

    def outputs(self) -> dict[str, TensorSpec]:
        assert isinstance(self.args, SegformerArgs)
        stride, pad = self.args.strides[0], self.args.patch_sizes[0] // 2
        sides = [(side + 2 * pad - self.args.patch_sizes[0]) // stride + 1 for side in self.args.size]
        return {"mask_logits": TensorSpec(dtype="float32", shape=(self.args.num_classes, *sides))}


class SwinArgs(ClassifierArgs):
    """What decides the shape of a Swin."""

    patch_size: int = Field(2, ge=1, le=64)  # pixels
    embed_dim: Width = 24  # channels of the first stage, doubled per stage
    depths: Counts = (2, 2)  # layers by stage
    num_heads: Counts = (2, 4)
    window_size: int = Field(4, ge=1, le=64)  # patches
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    drop_path_rate: Rate = 0.0
    hidden_act: Activation = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: Positive = 1e-5

    @model_validator(mode="after")
    def _patches_fill(self) -> Self:
        self.divides("patches", self.patch_size)
        check_heads([self.embed_dim * 2**stage for stage in range(len(self.depths))], self.num_heads)
        return self


class SwinForImageClassification(VisionNetwork):
    """Swin (Liu et al. 2021): pictures -> logits (B, K)."""

    Args = SwinArgs
    model_type = "swin"
    idle = BACKBONE | {"encoder_stride", "hidden_size", "num_layers"}  # of a head that it has not; counted
    sized = True


NETWORKS = {
    cls.__name__: cls
    for cls in (
        PvtForImageClassification,
        PvtV2ForImageClassification,
        SwinForImageClassification,
        SegformerForSemanticSegmentation,
    )
}

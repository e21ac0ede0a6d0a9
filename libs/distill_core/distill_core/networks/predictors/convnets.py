"""Convolutional networks of transformers: ResNet, ConvNeXt V2, MobileNet V2."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distill_core.networks.vision import (
    BACKBONE,
    Activation,
    ClassifierArgs,
    Counts,
    Positive,
    Rate,
    VisionArgs,
    VisionNetwork,
    Width,
    Widths,
)


class ResNetArgs(ClassifierArgs):
    """What decides the shape of a ResNet."""

    embedding_size: Width = 16  # channels of the stem, which divides sides by 4
    hidden_sizes: Widths = (16, 32, 64)  # channels by stage
    depths: Counts = (1, 1, 1)  # blocks by stage
    layer_type: Literal["basic", "bottleneck"] = "basic"
    hidden_act: Activation = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False


class ResNetForImageClassification(VisionNetwork):
    """ResNet (He et al. 2016): pictures (B, C, H, W) in [-1, 1] -> logits (B, K)."""

    Args = ResNetArgs
    model_type = "resnet"
    idle = BACKBONE

    @classmethod
    def config(cls, args: VisionArgs) -> dict[str, Any]:
        found = super().config(args)
        del found["image_size"]  # it takes any
        return found


class ConvNextV2Args(ClassifierArgs):
    """What decides the shape of a ConvNeXt V2."""

    patch_size: int = Field(2, ge=1, le=64)  # pixels of the stem's patches
    hidden_sizes: Widths = (16, 32, 64)  # channels by stage
    depths: Counts = (1, 1, 1)  # blocks by stage
    hidden_act: Activation = "gelu"
    layer_norm_eps: Positive = 1e-12
    drop_path_rate: Rate = 0.0


class ConvNextV2ForImageClassification(VisionNetwork):
    """ConvNeXt V2 (Woo et al. 2023): pictures -> logits (B, K)."""

    Args = ConvNextV2Args
    model_type = "convnextv2"
    idle = BACKBONE

    @classmethod
    def config(cls, args: VisionArgs) -> dict[str, Any]:
        assert isinstance(args, ConvNextV2Args)
        return {**super().config(args), "num_stages": len(args.depths)}


class MobileNetV2Args(ClassifierArgs):
    """What decides the shape of a MobileNet V2."""

    depth_multiplier: Positive = 0.25  # of the channels
    depth_divisible_by: int = Field(8, ge=1, le=64)
    min_depth: int = Field(8, ge=1, le=1024)  # least channels
    expand_ratio: Positive = 6.0
    output_stride: Literal[8, 16, 32] = 32
    first_layer_is_expansion: bool = True
    finegrained_output: bool = False  # True: 1280 channels at the end, whatever depth_multiplier says
    hidden_act: Activation = "relu6"
    tf_padding: bool = False
    classifier_dropout_prob: Rate = 0.2
    layer_norm_eps: Positive = 0.001


class MobileNetV2ForImageClassification(VisionNetwork):
    """MobileNet V2 (Sandler et al. 2018): pictures -> logits (B, K)."""

    Args = MobileNetV2Args
    model_type = "mobilenet_v2"
    idle = frozenset({"semantic_loss_ignore_index"})


NETWORKS = {
    cls.__name__: cls
    for cls in (
        ResNetForImageClassification,
        ConvNextV2ForImageClassification,
        MobileNetV2ForImageClassification,
    )
}

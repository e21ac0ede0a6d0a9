"""Networks of radio signals: I/Q frames (B, 2, L) of any level to logits of their modulations (B, K).

ClST, a convolutional transformer, and the two small students of its paper: Hou et al. 2023, arXiv 2312.17446. Widths,
depths and how the two attentions are merged are ours to choose; here they are summed.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.config import Config

Width = Annotated[int, Field(ge=2, le=2048)]
LEAST_POWER = 1e-12  # below it a frame is silence, and stays so


class SignalArgs(Config):
    """What all networks of signals are told by the data."""

    shape: tuple[int, int]  # (2, L): in-phase and quadrature
    num_classes: int = Field(ge=2, le=100_000)

    @model_validator(mode="after")
    def _is_iq(self) -> Self:
        if self.shape[0] != 2 or not 8 <= self.shape[1] <= 65_536:
            raise ValueError(f"shape {self.shape} is not allowed: 2 rows, I and Q, of 8 to 65536 samples")
        return self


class ClSTArgs(SignalArgs):
    """What decides the shape of a ClST."""

    widths: tuple[Width, ...] = Field((32, 64), min_length=1, max_length=8)  # channels by stage
    depths: tuple[Annotated[int, Field(ge=1, le=64)], ...] = (1, 2)  # blocks by stage
    num_heads: int = Field(4, ge=1, le=64)  # of both attentions
    strides: tuple[Annotated[int, Field(ge=1, le=64)], ...] = (
        4,
        2,
    )  # by stage: samples, then tokens, to a token
    mlp_ratio: int = Field(2, ge=1, le=16)  # hidden channels of a perceptron over its width

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if not len(self.depths) == len(self.strides) == len(self.widths):
            raise ValueError(f"depths and strides have one number for each of {len(self.widths)} widths")
        if odd := [width for width in self.widths if width % self.num_heads]:
            raise ValueError(f"a width of {odd[0]} does not divide into {self.num_heads} heads")
        return self


class SmallArgs(SignalArgs):
    """What decides the shape of a small student."""

    widths: tuple[Width, ...] = Field((8, 16, 16), min_length=1, max_length=8)  # channels by layer
    kernel: int = Field(5, ge=1, le=63)  # samples that a convolution sees; odd

    @model_validator(mode="after")
    def _is_odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} is even; give an odd number")
        return self


def unit_power(iq: Tensor) -> Tensor:
    """Frames (B, 2, L) of unit mean power |I + iQ|^2, so that their level tells nothing."""
    power = iq.square().sum(1, keepdim=True).mean(2, keepdim=True)
    return iq * power.clamp_min(LEAST_POWER).rsqrt()


class ConvolutionalProjection(nn.Module):
    """Queries, keys and values (B, C, N) each from a depth-wise convolution over the tokens and a linear map (CTP)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=1, groups=width, bias=False) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(3))
        self.maps = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [to(norm(local(x))) for local, norm, to in zip(self.local, self.norms, self.maps)]


class ParallelAttention(nn.Module):
    """Attention between tokens and, at the same time, between channels; their sum (PSCA). (B, C, N) -> (B, C, N)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = ConvolutionalProjection(width)
        self.scale = nn.Parameter(
            torch.ones(num_heads, 1, 1)
        )  # of the channels' attention, whose vectors are unit
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, width, tokens = x.shape
        q, k, v = (
            part.reshape(size, self.num_heads, width // self.num_heads, tokens) for part in self.project(x)
        )
        spatial = (q.transpose(2, 3) @ k * (width // self.num_heads) ** -0.5).softmax(-1)  # (B, h, N, N)
        of_tokens = v @ spatial.transpose(2, 3)
        channel = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.scale).softmax(-1)
        merged: Tensor = self.out((of_tokens + channel @ v).reshape(size, width, tokens))
        return merged


class Block(nn.Module):
    """Both attentions and a perceptron, each around a shortcut."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.GroupNorm(1, width), ParallelAttention(width, num_heads))
        self.perceptron = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv1d(width, mlp_ratio * width, 1),
            nn.GELU(),
            nn.Conv1d(mlp_ratio * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.perceptron(x)
        return out


class ClST(nn.Module):
    """Convolution-linked signal transformer: I/Q frames (B, 2, L) -> logits (B, K)."""

    Args = ClSTArgs

    def __init__(self, args: ClSTArgs) -> None:
        super().__init__()
        self.args = args
        stages: list[nn.Module] = []
        for before, width, stride, depth in zip((2, *args.widths), args.widths, args.strides, args.depths):
            stages += [  # the stage's token embedding, which overlaps, then its blocks
                nn.Conv1d(before, width, 2 * stride + 1, stride, padding=stride),
                nn.GroupNorm(1, width),
                *(Block(width, args.num_heads, args.mlp_ratio) for _ in range(depth)),
            ]
        self.stages = nn.Sequential(*stages)
        self.last = nn.Linear(args.widths[-1], args.num_classes)

    def forward(self, iq: Tensor) -> Tensor:
        logits: Tensor = self.last(self.stages(unit_power(iq)).mean(2))
        return logits


class _Small(nn.Module):
    """Base of the students: layers that halve the frame, then the mean over it."""

    Args = SmallArgs

    def __init__(self, args: SmallArgs) -> None:
        super().__init__()
        self.args = args
        pairs = zip((2, *args.widths), args.widths)
        self.layers = nn.Sequential(*(self.layer(a, b, args.kernel) for a, b in pairs))
        self.last = nn.Linear(args.widths[-1], args.num_classes)

    def layer(self, before: int, width: int, kernel: int) -> nn.Module:
        """One layer (B, C, L) -> (B, C', L / 2)."""
        raise NotImplementedError

    def forward(self, iq: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layers(unit_power(iq)).mean(2))
        return logits


class SignalCNN(_Small):
    """The convolutional student, KD-CNN: I/Q frames (B, 2, L) -> logits (B, K)."""

    def layer(self, before: int, width: int, kernel: int) -> nn.Module:
        convolution = nn.Conv1d(before, width, kernel, 2, padding=kernel // 2)
        return nn.Sequential(convolution, nn.GroupNorm(1, width), nn.ReLU())


class SignalMobileNet(_Small):
    """The student of depth-wise separable convolutions, KD-MobileNet: I/Q frames (B, 2, L) -> logits (B, K)."""

    def layer(self, before: int, width: int, kernel: int) -> nn.Module:
        expanded = max(before, width)
        return nn.Sequential(  # expand, see neighbours, squeeze: Sandler et al. 2018, arXiv 1801.04381
            nn.Conv1d(before, expanded, 1),
            nn.ReLU6(),
            nn.Conv1d(expanded, expanded, kernel, 2, padding=kernel // 2, groups=expanded),
            nn.GroupNorm(1, expanded),
            nn.ReLU6(),
            nn.Conv1d(expanded, width, 1),
            nn.GroupNorm(1, width),
        )


NETWORKS = {"clst": ClST, "signal_cnn": SignalCNN, "signal_mobilenet": SignalMobileNet}

"""Weights of few bits: rounded to points, and packed into codes on disk.

    v = (w - b) / a,   a = max - min, b = min of its bucket;    code = nearest point c_k to v;    w' = b + a c_code

A bucket is `bucket` weights in a row of the flattened tensor. `bits` bits have 2^bits points in [0, 1]: equally spaced
ones (uniform quantisation), or learnt ones, a set for each tensor. A packed tensor is its codes, `bits` bits each, its
points, and a and b of each bucket: bits + 64 / bucket bits for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config, Words
from distill_core.errors import ConfigError

CODES, POINTS, SCALES, OFFSETS = ".codes", ".points", ".scales", ".offsets"
PARTS = (CODES, POINTS, SCALES, OFFSETS)
LEAST_SCALE = 1e-10  # of a bucket; below it all its weights are alike, and its scale is 1


class Packing(Config):
    """What config.json says of packed weights."""

    bits: int = Field(ge=1, le=8)
    bucket: int = Field(ge=1, le=2**20)  # weights that share scale and offset
    tensors: tuple[Words, ...] = Field(min_length=1, max_length=100_000)  # that are packed, by name


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A tensor of `shape` as codes (N,) uint8, points (2^bits,), and scales and offsets (buckets,)."""

    shape: tuple[int, ...]
    bucket: int
    codes: Tensor
    points: Tensor
    scales: Tensor
    offsets: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.points) - 1).bit_length()

    def unpacked(self) -> Tensor:
        """The weights, float32."""
        return at_points(self.codes, self.points, self.scales, self.offsets, self.bucket).reshape(self.shape)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors that a file keeps, by name."""
        codes = torch.from_numpy(packed_bits(self.codes.cpu().numpy(), self.bits))
        parts = (codes, self.points, self.scales, self.offsets)
        return {name + part: value.detach().cpu().clone() for part, value in zip(PARTS, parts)}  # none shared

    @classmethod
    def read(
        cls, name: str, shape: tuple[int, ...], packing: Packing, tensors: Mapping[str, Tensor]
    ) -> PackedTensor:
        """The tensor `name` of `shape` in a file's `tensors`.

        Raises:
            ConfigError: a part is missing, or of another size or type.
        """
        count = math.prod(shape)
        buckets = math.ceil(count / packing.bucket)
        wanted: dict[str, tuple[Any, int]] = {
            CODES: (torch.uint8, math.ceil(count * packing.bits / 8)),
            POINTS: (torch.float32, 2**packing.bits),
            SCALES: (torch.float32, buckets),
            OFFSETS: (torch.float32, buckets),
        }
        for part, (dtype, size) in wanted.items():
            found = tensors.get(name + part)
            if found is None or found.dtype != dtype or tuple(found.shape) != (size,):
                given = "is missing" if found is None else f"is {found.dtype} {tuple(found.shape)}"
                raise ConfigError(f"{name}{part} {given}, and should be {dtype} ({size},)")
        codes, *others = (tensors[name + part] for part in PARTS)
        unpacked = torch.from_numpy(unpacked_bits(codes.numpy(), packing.bits, count))
        return cls(shape, packing.bucket, unpacked, *others)


def uniform_points(bits: int) -> Tensor:
    """2^bits equally spaced points in [0, 1]."""
    return torch.linspace(0, 1, 2**bits)


def bucket_scales(weight: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets (buckets,) of a tensor: max - min and min of each bucket, float32."""
    rows = _rows(weight.detach().float().flatten(), bucket)
    offsets = rows.min(1).values
    scales = rows.max(1).values - offsets
    return torch.where(scales < LEAST_SCALE, torch.ones_like(scales), scales), offsets


def scaled(weight: Tensor, scales: Tensor, offsets: Tensor, bucket: int) -> Tensor:
    """V (N,) in [0, 1] of a tensor with these scales and offsets."""
    flat = weight.detach().float().flatten()
    return (flat - _spread(offsets, bucket, flat.numel())) / _spread(scales, bucket, flat.numel())


def nearest_codes(values: Tensor, points: Tensor) -> Tensor:
    """Number (N,) int64 of the point nearest to each of `values`; `points` (2^bits,) ascend."""
    return torch.bucketize(values, (points[1:] + points[:-1]).detach() / 2)


def at_points(codes: Tensor, points: Tensor, scales: Tensor, offsets: Tensor, bucket: int) -> Tensor:
    """W' (N,) = b + a c_code: differentiable in the points, whose gradients are sums over their weights."""
    count = codes.numel()
    return _spread(offsets, bucket, count) + _spread(scales, bucket, count) * points[codes.long()]


def pack(weight: Tensor, points: Tensor, bucket: int) -> PackedTensor:
    """`weight` rounded to `points`, which ascend."""
    scales, offsets = bucket_scales(weight, bucket)
    codes = nearest_codes(scaled(weight, scales, offsets, bucket), points)
    shape = tuple(weight.shape)
    return PackedTensor(shape, bucket, codes.to(torch.uint8), points.detach().float(), scales, offsets)


def quantized(weight: Tensor, bits: int, bucket: int) -> Tensor:
    """`weight` at equally spaced points; its gradient is that of what it returns (straight-through)."""
    rounded: Tensor = _StraightThrough.apply(weight, bits, bucket)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, bucket: int) -> Tensor:
        return pack(weight, uniform_points(bits).to(weight.device), bucket).unpacked().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


def packable(network: nn.Module) -> list[str]:
    """Names of the parameters that are packed: weights of two axes or more, not biases and norms."""
    return [name for name, value in network.named_parameters() if value.ndim > 1]


def packed_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """`codes` (N,) below 2^bits as bytes, `bits` bits each, low bits first."""
    found: np.ndarray = np.packbits((codes[:, None] >> np.arange(bits)) & 1, bitorder="little")
    return found


def unpacked_bits(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` codes, uint8, in bytes that `packed_bits` made."""
    each = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    codes: np.ndarray = (each << np.arange(bits)).sum(1).astype(np.uint8)
    return codes


def _rows(flat: Tensor, bucket: int) -> Tensor:
    """(buckets, bucket), the last one filled up with its last value."""
    missing = -flat.numel() % bucket
    return torch.cat([flat, flat[-1:].expand(missing)]).reshape(-1, bucket)


def _spread(values: Tensor, bucket: int, count: int) -> Tensor:
    """A value for each weight (count,) of those for each bucket."""
    return values.repeat_interleave(bucket)[:count]

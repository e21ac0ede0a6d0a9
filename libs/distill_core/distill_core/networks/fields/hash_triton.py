"""The hash encoding as Triton kernels: what `HashField.encode` computes, in one pass over the points on a GPU.

    out[m, l] = sum_k w_k(u_m) table[index_k(u_m)]          k: the 8 corners of the cell of u_m at level l

A program holds BLOCK points at one level. Backward repeats the indices and adds into the table's gradient atomically:
the order of the additions differs between runs, so training is no longer deterministic to the last bit. Gradients of
gradients are not there; the PyTorch version, which is the oracle of the tests, has them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_core.networks.fields.hash import Level

log = logging.getLogger(__name__)
BLOCK = 128  # points per program
CHECK_POINTS = 64  # of the self-test


def encode(unit: Tensor, table: Tensor, levels: Sequence[Level]) -> Tensor:
    """Encoding (M, L * F) of positions (M, 3) in [0, 1]^3 from the common table (E, F); zero outside."""
    scales = torch.tensor([level.scale for level in levels], device=table.device)
    layout = [[level.resolution + 1, level.dense, level.offset, level.length - 1] for level in levels]
    places = torch.tensor(layout, dtype=torch.int32, device=table.device)
    encoding: Tensor = hash_encode(unit.float().contiguous(), table.contiguous(), scales, places)
    return encoding


def works(device: torch.device) -> bool:
    """Self-test of the kernels on `device`: a constant table must come back from inside, and zeros from outside."""
    unit = torch.linspace(-0.2, 1.2, CHECK_POINTS, device=device)[:, None].expand(-1, 3).contiguous()
    table = torch.ones(8, 2, device=device)
    places = torch.tensor([[2, 0, 0, 7]], dtype=torch.int32, device=device)
    try:
        encoding = hash_encode(unit, table, torch.tensor([3.0], device=device), places)
    except Exception:
        log.warning("the hash encoding's Triton kernels do not run here; PyTorch does instead", exc_info=True)
        return False
    inside = ((unit >= 0) & (unit <= 1)).all(-1, keepdim=True)
    return torch.allclose(encoding, inside.to(encoding).expand(-1, 2), atol=1e-5)


@torch.library.custom_op("distillery::hash_encode", mutates_args=())
def hash_encode(unit: Tensor, table: Tensor, scales: Tensor, places: Tensor) -> Tensor:
    """`places` (L, 4) int32: stride of a dense level, dense or not, first entry, mask of a hashed level's length."""
    count, features = len(unit), table.shape[1]
    out = table.new_empty(count, len(scales) * features)
    grid = (triton.cdiv(count, BLOCK), len(scales))
    if count:
        _forward[grid](unit, table, scales, places, out, count, **_sizes(len(scales), features))
    return out


@hash_encode.register_fake
def _(unit: Tensor, table: Tensor, scales: Tensor, places: Tensor) -> Tensor:
    return table.new_empty(len(unit), len(scales) * table.shape[1])


@torch.library.custom_op("distillery::hash_encode_backward", mutates_args=())
def hash_encode_backward(
    gradient: Tensor, unit: Tensor, table: Tensor, scales: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the positions and of the table."""
    to_unit, to_table = torch.zeros_like(unit), torch.zeros_like(table)
    count, features = len(unit), table.shape[1]
    grid = (triton.cdiv(count, BLOCK), len(scales))
    if count:
        sizes = _sizes(len(scales), features)
        _backward[grid](gradient, unit, table, scales, places, to_unit, to_table, count, **sizes)
    return to_unit, to_table


@hash_encode_backward.register_fake
def _(gradient: Tensor, unit: Tensor, table: Tensor, scales: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(unit), torch.empty_like(table)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return (*hash_encode_backward(gradient.contiguous(), *ctx.saved_tensors), None, None)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


hash_encode.register_autograd(_differentiate, setup_context=_remember)


def _sizes(levels: int, features: int) -> dict[str, int]:
    return {"LEVELS": levels, "F": features, "WIDE": triton.next_power_of_2(features), "SIZE": BLOCK}


@triton.jit
def _cell(unit, scales, places, point, there, level):  # type: ignore[no-untyped-def]
    """Cell, position in it, and inside or not, for each axis of the program's points."""
    scale = tl.load(scales + level)
    x = tl.load(unit + 3 * point, mask=there, other=-1.0)
    y = tl.load(unit + 3 * point + 1, mask=there, other=-1.0)
    z = tl.load(unit + 3 * point + 2, mask=there, other=-1.0)
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1) & (z >= 0) & (z <= 1)
    x = tl.minimum(tl.maximum(x, 0.0), 1.0) * scale + 0.5
    y = tl.minimum(tl.maximum(y, 0.0), 1.0) * scale + 0.5
    z = tl.minimum(tl.maximum(z, 0.0), 1.0) * scale + 0.5
    i, j, k = tl.floor(x), tl.floor(y), tl.floor(z)
    return i.to(tl.int32), j.to(tl.int32), k.to(tl.int32), x - i, y - j, z - k, inside


@triton.jit
def _entry(i, j, k, places, level):  # type: ignore[no-untyped-def]
    """The table's entry of a corner: dense, or hashed by products that wrap around in int32."""
    stride = tl.load(places + 4 * level)
    dense = tl.load(places + 4 * level + 1)
    offset = tl.load(places + 4 * level + 2)
    mask = tl.load(places + 4 * level + 3)
    straight = i + j * stride + k * (stride * stride)
    hashed = (i ^ (j * -1640531535) ^ (k * 805459861)) & mask
    return tl.where(dense != 0, straight, hashed) + offset


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    unit, table, scales, places, out, count,
    LEVELS: tl.constexpr, F: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(1)
    point = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = point < count
    feature = tl.arange(0, WIDE)
    i, j, k, x, y, z, inside = _cell(unit, scales, places, point, there, level)
    total = tl.zeros((SIZE, WIDE), dtype=tl.float32)
    active = (there & inside)[:, None] & (feature < F)[None, :]
    for corner in tl.static_range(8):
        dx, dy, dz = corner & 1, (corner >> 1) & 1, corner >> 2
        weight = (x * dx + (1 - x) * (1 - dx)) * (y * dy + (1 - y) * (1 - dy)) * (z * dz + (1 - z) * (1 - dz))
        entry = _entry(i + dx, j + dy, k + dz, places, level).to(tl.int64)
        values = tl.load(table + entry[:, None] * F + feature[None, :], mask=active, other=0.0)
        total += weight[:, None] * values
    place = point.to(tl.int64)[:, None] * (LEVELS * F) + level * F + feature[None, :]
    tl.store(out + place, total, mask=there[:, None] & (feature < F)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    gradient, unit, table, scales, places, to_unit, to_table, count,
    LEVELS: tl.constexpr, F: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(1)
    point = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = point < count
    feature = tl.arange(0, WIDE)
    i, j, k, x, y, z, inside = _cell(unit, scales, places, point, there, level)
    active = (there & inside)[:, None] & (feature < F)[None, :]
    place = point.to(tl.int64)[:, None] * (LEVELS * F) + level * F + feature[None, :]
    pulled = tl.load(gradient + place, mask=active, other=0.0)
    along_x = tl.zeros((SIZE,), dtype=tl.float32)
    along_y = tl.zeros((SIZE,), dtype=tl.float32)
    along_z = tl.zeros((SIZE,), dtype=tl.float32)
    for corner in tl.static_range(8):
        dx, dy, dz = corner & 1, (corner >> 1) & 1, corner >> 2
        wx, wy, wz = x * dx + (1 - x) * (1 - dx), y * dy + (1 - y) * (1 - dy), z * dz + (1 - z) * (1 - dz)
        entry = _entry(i + dx, j + dy, k + dz, places, level).to(tl.int64)
        cells = entry[:, None] * F + feature[None, :]
        tl.atomic_add(to_table + cells, pulled * (wx * wy * wz)[:, None], mask=active)
        along = tl.sum(pulled * tl.load(table + cells, mask=active, other=0.0), axis=1)
        along_x += along * (2 * dx - 1) * wy * wz
        along_y += along * (2 * dy - 1) * wx * wz
        along_z += along * (2 * dz - 1) * wx * wy
    scale = tl.load(scales + level)
    tl.atomic_add(to_unit + 3 * point, along_x * scale, mask=there & inside)
    tl.atomic_add(to_unit + 3 * point + 1, along_y * scale, mask=there & inside)
    tl.atomic_add(to_unit + 3 * point + 2, along_z * scale, mask=there & inside)

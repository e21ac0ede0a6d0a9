"""Reductions over the processes of one training, so that all of them decide alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_alone = ContextVar("alone", default=False)


def over_processes(values: Tensor, *, largest: bool = False) -> Tensor:
    """The sum of `values` over all training processes, or their largest, in place; so that all decide alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not _alone.get():
        reduction = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(values, reduction)
    return values


def of_all_processes(values: Tensor) -> Tensor:
    """The rows of `values` (B, …) of all training processes, in the order of their ranks; B is the same in each."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or _alone.get():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A trial step of this process, which the others need not take: its values are those of all for the duration."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)

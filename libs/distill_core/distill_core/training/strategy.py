"""Strategy by which the processes of a job hold the trained networks: each whole, or a share each, see `sharding`.

FSDP is imported only where networks are sharded: it takes half a second, which every job would wait for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill_core.method import Method

Parts = dict[str, dict[str, Tensor]]


class Replicated:
    """Every process holds all weights; gradients are averaged in one message."""

    def __init__(self, method: Method, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.parameters = {role: trained(getattr(method, role)) for role in method.roles}
        self.leaves = self.parameters  # what a role's gradients are taken with respect to

    @property
    def keeps(self) -> bool:
        """Whether this process is the one that writes checkpoints, previews and the result."""
        main: bool = self._accelerator.is_main_process
        return main

    def average(self, role: str) -> None:
        """Mean gradient over processes. No wrapper: a method calls its networks any way it likes."""
        if self._accelerator.num_processes == 1:
            return
        parameters = self.parameters[role]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self._accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        offset = 0
        for parameter in parameters:
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """A method's pass, forward or backward."""
        yield

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Plain, whole networks in the process that `keeps`; all processes enter."""
        yield

    def gathered(self, tensors: Parts) -> Parts:
        """Whole tensors in the process that `keeps`; all processes call."""
        return tensors


def place(value: Tensor, like: Any) -> Tensor:
    """`value`, or this process's share of it where `like` is one of several shares."""
    if not is_share(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()


def local(values: Iterable[Any]) -> list[Tensor]:
    """This process's shares of `values`, to be changed in place."""
    return [value.to_local() if is_share(value) else value for value in values]


def is_share(value: Tensor) -> bool:
    """Whether a tensor is this process's share of a whole one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]

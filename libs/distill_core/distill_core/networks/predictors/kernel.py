"""Kernel machine: a weighted sum of Gaussian kernels around the items that it was fitted to."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config


class KernelMachineArgs(Config):
    """What decides the machine's shape."""

    shape: tuple[int, ...]  # of an item, e.g. (C, H, W)
    num_classes: int = Field(ge=1, le=1_000_000)  # outputs
    num_items: int = Field(ge=1, le=100_000)  # that it is fitted to
    gamma: float = Field(1.0, gt=0)  # 1 / (length scale squared), in 1 / units of the items squared


class KernelMachine(nn.Module):
    """f(x) = sum_i k(x, x_i) c_i with k(x, x') = exp(-gamma |x - x'|^2); items (B, …) to outputs (B, K)."""

    Args = KernelMachineArgs

    items: Tensor

    def __init__(self, args: KernelMachineArgs) -> None:
        super().__init__()
        self.args = args
        self.register_buffer("items", torch.zeros(args.num_items, math.prod(args.shape), dtype=torch.float64))
        self.coefficients = nn.Parameter(torch.zeros(args.num_items, args.num_classes, dtype=torch.float64))

    def kernel(self, x: Tensor) -> Tensor:
        """k(x, x_i), (B, N), of items (B, …)."""
        distance = torch.cdist(x.flatten(1).double(), self.items).square()
        return torch.exp(-self.args.gamma * distance)

    def forward(self, x: Tensor) -> Tensor:
        return (self.kernel(x) @ self.coefficients).float()


NETWORKS = {"kernel_machine": KernelMachine}

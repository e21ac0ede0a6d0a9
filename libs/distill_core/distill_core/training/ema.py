"""Exponential moving average of a role's weights, for evaluation and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill_core.training.layout import local, place


class EMA:
    """Averages the parameters of `module`; counts only that role's own updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move weights <- decay * weights + (1 - decay) * module."""
        trained = [value.detach() for value in module.parameters()]
        torch._foreach_lerp_(local(self.weights.values()), local(trained), 1 - self.decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take weights back from a checkpoint, whose order of names is its own."""
        for name, value in self.weights.items():
            value.copy_(place(weights[name], value))

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average in place of the trained weights for the duration."""
        trained = {name: value.detach().clone() for name, value in module.named_parameters()}
        _copy(self.weights, module)
        try:
            yield
        finally:
            _copy(trained, module)


@torch.no_grad()
def _copy(weights: dict[str, Tensor], module: nn.Module) -> None:
    for name, value in module.named_parameters():
        value.copy_(weights[name])

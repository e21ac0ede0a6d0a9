"""Exponential moving average of a role's weights, for evaluation and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill_core.training.strategy import local, place


class EMA:
    """Averages the parameters of `module`; counts only that role's own updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = tuple(name for name, _ in module.named_parameters())
        self._buffers = _statistics(module)
        self.weights = {name: value.detach().clone() for name, value in self._averaged(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move weights <- decay * weights + (1 - decay) * module."""
        trained = [value.detach() for value in self._averaged(module).values()]
        torch._foreach_lerp_(local(self.weights.values()), local(trained), 1 - self.decay)

    @torch.no_grad()
    def copy(self, module: nn.Module) -> None:
        """Take the module's weights as they are: a closed form is no step to be averaged."""
        for name, value in self._averaged(module).items():
            self.weights[name].copy_(value)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take weights back from a checkpoint, whose order of names is its own; earlier ones hold no buffers."""
        for name, value in self.weights.items():
            if name in weights or name in self._parameters:
                value.copy_(place(weights[name], value))

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average in place of the trained weights for the duration."""
        trained = {name: value.detach().clone() for name, value in self._averaged(module).items()}
        self._put(self.weights, module)
        try:
            yield
        finally:
            self._put(trained, module)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor], module: nn.Module) -> None:
        for name, value in self._averaged(module).items():
            value.copy_(weights[name])

    def _averaged(self, module: nn.Module) -> dict[str, Tensor]:
        """Parameters and statistics of the module by name; which these are is found once, not at each update."""
        parameters = dict(zip(self._parameters, module.parameters(), strict=True))
        return parameters | {name: module.get_buffer(name) for name in self._buffers}


def _statistics(module: nn.Module) -> tuple[str, ...]:
    """Names of the floating-point buffers that a checkpoint keeps: the running statistics of BatchNorm."""
    kept = module.state_dict(keep_vars=True)
    return tuple(name for name, value in module.named_buffers() if name in kept and value.is_floating_point())

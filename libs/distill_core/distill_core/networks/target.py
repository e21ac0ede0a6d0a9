"""A target network: the student's own moving average, which consistency methods learn from (Song et al. 2023).

    theta_target <- decay theta_target + (1 - decay) theta        after every step; decay = 0: the student as it is

A method names its attribute in `held`, so that it is checkpointed.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distill_core.method import Cond
from distill_core.networks.denoiser import Denoiser


class TargetNetwork(nn.Module):
    """A frozen copy of `student` that follows it. Of a LoRA student it has factors of its own, over the same base."""

    def __init__(self, student: Denoiser, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.network = copy.deepcopy(student).requires_grad_(False)
        self._followed = -1  # the last step: micro-batches of one step move it once
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        """x0 (B, C, H, W), without gradient."""
        return self.network(x_sigma, sigma, cond)

    @torch.no_grad()
    def follow(self, student: Denoiser, step: int) -> None:
        """Move towards `student`, which training step `step` has changed; once a step."""
        if step != self._followed:
            self._followed = step
            own, trained = tuple(self.network.parameters()), tuple(student.parameters())
            torch._foreach_lerp_(own, trained, 1 - self.decay)


def _forget(target: TargetNetwork, keys: object) -> None:
    """With other weights in place, the step may be taken again: a trial step was rolled back."""
    target._followed = -1

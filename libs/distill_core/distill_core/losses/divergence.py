"""f-divergences D_f(p||q) = E_q[f(r)], r = p/q: the weight each gives a sample, and the ratio per noise level.

    d D_f / dtheta = -E[ h(r) (s_p - s_q) dx/dtheta ],   h(r) = f''(r) r^2     (f-distill, Xu et al. 2025, Theorem 1)

    divergence           f(r)                                h(r)
    reverse_kl           -ln r                               1
    softened_reverse_kl  (1 + r) ln((1 + r) / r)             1 / (1 + r)
    jensen_shannon       r ln r - (1 + r) ln(1 + r)          r / (1 + r)
    squared_hellinger    1 - sqrt(r)                         sqrt(r) / 4
    forward_kl           r ln r                              r
    jeffreys             (r - 1) ln r                        1 + r
    neyman               1 / r                               2 / r

p is the teacher's density, q the student's; constants and linear terms of f are left out. An h that grows with r
pulls the student to where the teacher has mass and the student none: forward_kl covers modes, reverse_kl seeks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill_core.reductions import over_processes

Divergence = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "neyman",
]

_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
}
assert set(_WEIGHTS) == set(get_args(Divergence))


def divergence_weight(divergence: Divergence, ratio: Tensor) -> Tensor:
    """h(r) of a divergence for density ratios `ratio` > 0, teacher over student; the shape of `ratio`."""
    return _WEIGHTS[divergence](ratio)


def density_ratio(logits: Tensor, low: float, high: float) -> Tensor:
    """Ratio r = p/q in [`low`, `high`], without gradient, from real/fake logits (B,): the best of those are ln r."""
    return logits.detach().float().clamp(-10, 10).exp().clamp(low, high)


def batch_normalised(weight: Tensor) -> Tensor:
    """`weight` (B,) over its mean, so that every divergence has the same mean step; over all processes' batches."""
    total = over_processes(torch.stack([weight.sum(), weight.new_tensor(float(len(weight)))]))
    return weight * (total[1] / total[0])


class TimeBinNormalizer(nn.Module):
    """Divides ratios by their running mean at that noise level: E_q[r] = 1 at every level, a discriminator's is not.

    `edges` (K + 1,) are the ascending noise levels between K bins. A bin's first mean is its first batch's; `decay`
    is the share of the old mean kept after that. With 0 a sample alone in its bin always gets 1, which is reverse
    KL: keep 0.9 or more below a batch of 256.
    """

    edges: Tensor
    means: Tensor

    def __init__(self, edges: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("means", torch.zeros(len(edges) - 1))  # 0: no sample yet

    @torch.no_grad()
    def forward(self, ratio: Tensor, sigma: Tensor) -> Tensor:
        """Ratios (B,) over their bins' means, which this batch has moved first; `sigma` (B,)."""
        bins = torch.bucketize(sigma, self.edges[1:-1])
        sums = torch.zeros_like(self.means).index_add_(0, bins, ratio)
        counts = torch.zeros_like(self.means).index_add_(0, bins, torch.ones_like(ratio))
        sums, counts = over_processes(torch.stack([sums, counts]))
        now = sums / counts.clamp_min(1)
        moved = torch.where(self.means > 0, torch.lerp(now, self.means, self.decay), now)
        self.means.copy_(torch.where(counts > 0, moved, self.means))
        return ratio / (self.means[bins] + 1e-6)

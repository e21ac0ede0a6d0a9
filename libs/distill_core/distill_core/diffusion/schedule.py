"""Noise schedules, all read in the variance-exploding form `x_sigma = x0 + sigma eps` (sigma in data units).

A network trained under another form sees `scale(sigma) * x_sigma` at the time `network_time(sigma)`:

    kind   its own form                          scale                      time
    edm    x0 + sigma eps                        1/sqrt(sigma^2 + sd^2)     ln(sigma) / 4
    vp     sqrt(ab) x0 + sqrt(1 - ab) eps        1/sqrt(1 + sigma^2)        index with that sigma, interpolated
    flow   (1 - t) x0 + t eps                    1/(1 + sigma)              N t,  t = sigma / (1 + sigma), N: 1000
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Parameterisation = Literal["edm", "eps", "v", "x0", "flow"]


class NoiseSchedule:
    """A schedule's conversions and its own training distribution over noise levels."""

    def __init__(
        self,
        kind: Literal["edm", "vp", "flow"],
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        alphas_cumprod: Tensor | None = None,
        num_timesteps: int = 1000,
        zero_snr: bool = False,
    ) -> None:
        self.kind, self.sigma_data, self.num_timesteps = kind, sigma_data, num_timesteps
        self.log_sigmas: Tensor | None = None
        if kind == "vp":
            assert alphas_cumprod is not None
            kept = alphas_cumprod.double()
            # The last level stays finite: with betas rescaled to no signal there, it is above all others.
            kept = kept.clamp_min(float(kept[-1]) or float(kept[-2]) / 4 if zero_snr else 1e-6)
            self.log_sigmas = 0.5 * (torch.log1p(-kept) - torch.log(kept))
            if zero_snr:  # levels that the last one caps lie closely below it, each with its own time
                below = 1e-5 * torch.arange(len(kept)).flip(0)
                self.log_sigmas = torch.minimum(self.log_sigmas, self.log_sigmas[-1] - below)
            sigma_min, sigma_max = (float(self.log_sigmas[i].exp()) for i in (0, -1))
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scale(self, sigma: Tensor) -> Tensor:
        """The factor of `x_sigma` before the network."""
        if self.kind == "edm":
            return (sigma**2 + self.sigma_data**2).rsqrt()
        return (1 + sigma**2).rsqrt() if self.kind == "vp" else 1 / (1 + sigma)

    def start_scale(self, sigma: float) -> float:
        """The factor that makes unit noise the pure-noise input at level `sigma`, in the variance-exploding form."""
        if self.kind == "edm":
            return sigma
        return (1 + sigma**2) ** 0.5 if self.kind == "vp" else 1 + sigma

    def network_time(self, sigma: Tensor) -> Tensor:
        """The float time, shaped like `sigma`, that the network was trained to be told."""
        if self.kind == "edm":
            return sigma.log() / 4
        if self.kind == "flow":
            return self.num_timesteps * sigma / (1 + sigma)
        assert self.log_sigmas is not None
        levels = self.log_sigmas.to(sigma.device, torch.float32)
        log_sigma = sigma.log().clamp(levels[0], levels[-1])
        high = (log_sigma[..., None] > levels).sum(-1).clamp(1, len(levels) - 1)
        low = high - 1
        return low + (log_sigma - levels[low]) / (levels[high] - levels[low])

    def sigma_at(self, u: Tensor) -> Tensor:
        """The level at the fraction `u` in [0, 1] of the schedule's own grid, 0 = least noise.

        edm: the rho = 7 grid (Karras et al. 2022, Eq. 5); vp: training timesteps; flow: t.
        """
        if self.kind == "edm":
            low, high = (float(s ** (1 / 7)) for s in (self.sigma_min, self.sigma_max))
            return (low + u * (high - low)) ** 7
        if self.kind == "flow":
            low, high = (s / (1 + s) for s in (self.sigma_min, self.sigma_max))
            t = low + u * (high - low)
            return t / (1 - t)
        assert self.log_sigmas is not None
        levels = self.log_sigmas.to(u.device, torch.float32)
        position = u * (len(levels) - 1)
        low_index = position.long().clamp(max=len(levels) - 2)
        return torch.lerp(levels[low_index], levels[low_index + 1], position - low_index).exp()

    def nearest(self, sigma: float) -> float:
        """The level that the network was trained at and `sigma` is closest to; other forms know every level."""
        if self.log_sigmas is None:
            return sigma
        return float(self.log_sigmas[self.index_of(sigma)].exp())

    def index_of(self, sigma: float) -> int:
        """vp: the training timestep whose level is closest to `sigma`."""
        assert self.log_sigmas is not None
        return int((self.log_sigmas - math.log(sigma)).abs().argmin())

    def spread(self, start: float, count: int) -> tuple[float, ...]:
        """`count` levels at even distances of the schedule's own grid, from `start` on downwards.

        edm: rho = 7; flow: t; vp: timesteps, as consistency samplers space them, e.g. 999, 749, 499, 249.
        """
        shares = [index / count for index in range(count)]
        if self.kind == "edm":
            high, low = start ** (1 / 7), self.sigma_min ** (1 / 7)
            return (start, *((high + share * (low - high)) ** 7 for share in shares[1:]))
        if self.kind == "flow":
            times = [start / (1 + start) * (1 - share) for share in shares]
            return (start, *(t / (1 - t) for t in times[1:]))
        assert self.log_sigmas is not None
        first = self.index_of(start)
        indices = [first - index * (first + 1) // count for index in range(count)]
        return tuple(float(self.log_sigmas[index].exp()) for index in indices)

    def same_as(self, other: NoiseSchedule) -> bool:
        """Whether a level means the same under both."""
        ours, theirs = ((one.kind, one.sigma_data, one.sigma_min, one.sigma_max) for one in (self, other))
        if ours[0] != theirs[0] or any(
            not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours[1:], theirs[1:])
        ):
            return False
        if self.log_sigmas is None or other.log_sigmas is None:
            return True
        return self.log_sigmas.shape == other.log_sigmas.shape and torch.allclose(
            self.log_sigmas, other.log_sigmas, atol=1e-4
        )

    def __str__(self) -> str:
        return f"{self.kind} from {self.sigma_min:.3g} to {self.sigma_max:.3g}"

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight of |x0_hat - x0|^2 that equals the form's own loss: EDM's lambda, the eps loss, the velocity loss."""
        if self.kind == "edm":
            return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return sigma**-2 if self.kind == "vp" else ((1 + sigma) / sigma) ** 2


def to_x0(
    output: Tensor,
    x_sigma: Tensor,
    sigma: Tensor,
    parameterisation: Parameterisation,
    sigma_data: float = 0.5,
) -> Tensor:
    """A network's raw output as x0. `sigma` broadcasts against `x_sigma`; coefficients are float32 or better."""
    if parameterisation == "edm":
        total = sigma**2 + sigma_data**2
        return sigma_data**2 / total * x_sigma + sigma * sigma_data * total.rsqrt() * output
    if parameterisation == "eps":
        return x_sigma - sigma * output
    if parameterisation == "v":  # v = alpha eps - sigma_vp x0 with alpha = 1/sqrt(1 + sigma^2)
        alpha = (1 + sigma**2).rsqrt()
        return alpha**2 * x_sigma - alpha * sigma * output
    if parameterisation == "flow":  # x_t = x_sigma / (1 + sigma), output = eps - x0
        return (x_sigma - sigma * output) / (1 + sigma)
    return output

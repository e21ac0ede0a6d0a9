"""Solver steps for training, at levels of their own for each item; `sampling` has the samplers that are served.

    ODE  dx/dsigma = eps(x, sigma)
    ddim      x + (e - s) eps(x, s)                                      order 1; in this form also Euler's step
    heun      x + (e - s) (eps(x, s) + eps(x', e)) / 2,  x' as by ddim   order 2 (Karras et al. 2022, Algorithm 1)
    dpmpp_2m  (e/s) x + (1 - e/s) ((1 + r) D - r D_before),  r = ln(s/e) / (2 ln(s_before/s))
              order 2 (DPM-Solver++, Lu et al. 2022, Algorithm 2); the first step and the last one to 0 are ddim's
    sde       D + sqrt(e^2 - q) eps + sqrt(q) eps',  q = eta^2 (e/s)^2 (s^2 - e^2)
              eta = 0 is ddim, eta = 1 the reverse of the forward process (DDIM, Song et al. 2020, Eq. 16)

D is the prediction of x0 at s, eps = (x - D) / s, e the next level, eps' fresh noise. One evaluation a step; heun: two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core.config import Config
from distill_core.diffusion.levels import expand
from distill_core.diffusion.trajectory import Denoise, eps_of, jump

RHO = 7.0  # of the levels between two others (Karras et al. 2022, Eq. 5)


class SolverConfig(Config):
    """A solver of the teacher's ODE or SDE, and into how many steps it parts an interval."""

    kind: Literal["ddim", "heun", "dpmpp_2m", "sde"] = "ddim"  # of the teacher's step
    substeps: int = Field(1, ge=1, le=1000)  # that one step is cut into
    eta: float = Field(1.0, ge=0, le=1)  # sde: share of fresh noise


def advance(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, solver: SolverConfig) -> Tensor:
    """The state (B, ...) at `sigma_next` of the trajectory through `x` at `sigma`; levels (B,) or (B, F)."""
    for state in walk(denoise, x, between(sigma, sigma_next, solver.substeps), solver):
        x = state
    return x


def walk(denoise: Denoise, x: Tensor, levels: Sequence[Tensor], solver: SolverConfig) -> Iterator[Tensor]:
    """The states (B, ...) after each step from `levels[0]` on, one step from a level to the next."""
    before: tuple[Tensor, Tensor] | None = None  # of the last step: its level and its x0
    for sigma, sigma_next in pairwise(levels):
        x0 = denoise(x, sigma)
        if solver.kind == "heun":
            x = _heun(denoise, x, x0, sigma, sigma_next)
        elif solver.kind == "sde":
            x = _sde(x, x0, sigma, sigma_next, solver.eta)
        else:
            lead = (
                x0
                if solver.kind == "ddim" or before is None
                else _extrapolated(x0, sigma, sigma_next, before)
            )
            x = jump(x, lead, sigma, sigma_next)
        before = sigma, x0
        yield x


def between(sigma: Tensor, sigma_next: Tensor, count: int) -> list[Tensor]:
    """`count` + 1 levels from `sigma` to `sigma_next`, both as they are, at even distances of level^(1/7)."""
    top, bottom = sigma ** (1 / RHO), sigma_next ** (1 / RHO)
    inner = [(top + index / count * (bottom - top)) ** RHO for index in range(1, count)]
    return [sigma, *inner, sigma_next]


def _heun(denoise: Denoise, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    first = jump(x, x0, sigma, sigma_next)
    ends = sigma_next == 0  # no slope there: Euler's step is the last one
    level = torch.where(ends, sigma, sigma_next)
    slope = eps_of(first, denoise(first, level), level)
    second = x + expand(sigma_next - sigma, x) * (eps_of(x, x0, sigma) + slope) / 2
    return torch.where(expand(ends, x), first, second)


def _extrapolated(x0: Tensor, sigma: Tensor, sigma_next: Tensor, before: tuple[Tensor, Tensor]) -> Tensor:
    """x0 in the middle of the step, on the line through this prediction and the last one."""
    last_sigma, last_x0 = before
    ratio = (sigma / sigma_next).log() / (2 * (last_sigma / sigma).log())
    ratio = torch.where(sigma_next > 0, ratio, torch.zeros_like(ratio))
    return x0 + expand(ratio, x0) * (x0 - last_x0)


def _sde(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    fresh = eta**2 * (sigma_next / sigma) ** 2 * (sigma**2 - sigma_next**2)
    kept = (sigma_next**2 - fresh).clamp_min(0).sqrt()
    return jump(x, x0, sigma, kept) + expand(fresh.sqrt(), x) * torch.randn_like(x)

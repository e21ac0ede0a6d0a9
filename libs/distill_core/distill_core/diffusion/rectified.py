"""Straight paths from a picture to noise (rectified flow, arXiv 2209.03003), and how straight a path is.

    t = s / (1 + s),   x_t = x_s / (1 + s) = (1 - t) x0 + t eps,   u(x_t, t) = eps - x0,   x_s = x0 + s eps

Whatever a network predicts, its x0 says the velocity u = (x_t - x0) / t, so every teacher is a flow on these lines from
the first update on: with sigma = t / (1 - t) and x_t / (1 - t) it is asked in its own terms (RF++, arXiv 2405.20320).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill_core.diffusion.levels import expand
from distill_core.diffusion.solvers import SolverConfig, walk
from distill_core.diffusion.trajectory import Denoise

Times = Literal["uniform", "u_shaped"]


def flow_time(sigma: Tensor) -> Tensor:
    """T in [0, 1) of a level: 0 is the picture."""
    return sigma / (1 + sigma)


def level_of(t: Tensor) -> Tensor:
    """The level, data std, of t in [0, 1)."""
    return t / (1 - t)


def velocity(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """U (B, ...) that a prediction `x0` at `x_sigma` says."""
    return (x_sigma - x0) / expand(sigma, x_sigma) - x0


def draw_times(count: int, law: Times, steepness: float, like: Tensor) -> Tensor:
    """(count,) times in [0, 1], uniform or of the density p(t) ~ e^(a t) + e^(a (1 - t)), a the steepness (RF++)."""
    u = torch.rand(count, device=like.device)
    if law == "uniform":
        return u
    t = torch.log1p(u * math.expm1(steepness)) / steepness
    return torch.where(torch.rand(count, device=like.device) < 0.5, t, 1 - t)


def deviation(denoise: Denoise, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Mean |(x_1 - x_0) - u(x_t, t)|^2 (B,) along the model's own path by Euler's steps from `x`: 0 for a straight one.

    `levels` (B,) each, descending, the last of them 0.
    """
    states, times = [x], [flow_time(sigma) for sigma in levels]
    states += walk(denoise, x, levels, SolverConfig())
    points = [state / expand(1 + sigma, state) for state, sigma in zip(states, levels, strict=True)]
    chord = (points[0] - points[-1]) / expand(times[0] - times[-1], x)
    found = []
    for k in range(len(points) - 1):
        u = (points[k] - points[k + 1]) / expand(times[k] - times[k + 1], x)
        found.append((chord - u).square().flatten(1).mean(1))
    return torch.stack(found).mean(0)

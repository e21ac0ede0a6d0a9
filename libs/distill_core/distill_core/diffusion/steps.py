"""Sampling as a table: for each evaluation of the network its level, what it is told, and what follows from its answer.

    D     = denoise(x, sigma_k, time_k)                    x is the state, or ahead of it
    state = a state + b D_k + c D_{k-1} + d D_{k-2} + noise z_{k+1}
    x     = a' state + b' D_k + c' D_{k-1}                 where a step looks ahead of its state; else the state

Every sampler here is linear in the state and the answers, so a table of coefficients is all that it is. All is in the
variance-exploding form x = x0 + sigma eps. Arithmetic operators only: torch tensors and NumPy arrays alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Array = Any  # torch.Tensor or numpy.ndarray
Denoise = Callable[..., Array]  # (x_sigma, sigma), or (x_sigma, sigma, time) where a level has its own time

INFINITE = 1e6  # stands for the level without any signal: flow time 1, or betas that end at none


@dataclass(frozen=True)
class Step:
    """One evaluation, and the coefficients of what follows. A coefficient of 0 is not computed, nor one of 1."""

    sigma: float  # level of what the network is shown, data std
    time: float | None  # what it is told: an index, or 1000 t; None: what its schedule says of the level
    state: tuple[float, float, float, float]  # of the state, and of this answer and the two before
    noise: float = 0.0  # of fresh unit noise in the state
    ahead: tuple[float, float, float] | None = None  # of the new state, this answer and the one before
    raw: float = 0.0  # of the answer as it was before it was clamped, in the state


@dataclass(frozen=True)
class Path:
    """A sampler's way from noise to x0: the first x is `start` times unit noise."""

    start: float
    steps: Sequence[Step]


def follow(
    denoise: Denoise,
    x: Array,
    steps: Sequence[Step],
    draw: Callable[[int], Array],
    clamp: Callable[[Array], Array] | None = None,
) -> Array:
    """x0 at the end of the steps; `draw(k)` is the unit noise that precedes evaluation k, which count from 0."""
    state, before, earlier = x, None, None
    for index, step in enumerate(steps):
        told = () if step.time is None else (step.time,)
        raw = denoise(x, step.sigma, *told)
        x0 = raw if clamp is None else clamp(raw)
        state = _sum((*step.state, step.raw), (state, x0, before, earlier, raw))
        if step.noise:
            state = state + draw(index + 1) * step.noise
        x = state if step.ahead is None else _sum(step.ahead, (state, x0, before))
        before, earlier = x0, before
    return x


def _sum(coefficients: Sequence[float], values: Sequence[Array]) -> Array:
    terms = [
        value if factor == 1 else value * factor
        for factor, value in zip(coefficients, values, strict=True)
        if factor
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def renoised(levels: Sequence[tuple[float, float | None]], eta: float = 1.0) -> list[Step]:
    """Few-step sampling of a student: predict x0, noise it to the next level, repeat.

    The noise is fresh (`eta` = 1), what the student saw (0, the ODE's chain), or both, by variance.
    """
    steps = []
    for (sigma, time), following in zip(levels, [*(sigma for sigma, _ in levels[1:]), 0.0]):
        seen = (1 - eta**2) ** 0.5 * following / sigma
        steps.append(Step(sigma, time, (seen, 1 - seen, 0, 0), eta * following))
    return steps


def euler(levels: Sequence[tuple[float, float | None]], last: float = 0.0) -> list[Step]:
    """First-order steps of the probability-flow ODE: x' = D + (x - D) sigma' / sigma; the last ends at level `last`."""
    after = [*(sigma for sigma, _ in levels[1:]), last]
    return [
        Step(sigma, time, (following / sigma, 1 - following / sigma, 0, 0))
        for (sigma, time), following in zip(levels, after)
    ]

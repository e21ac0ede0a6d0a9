"""Steps from level to level, in the variance-exploding form: rho = sigma' / sigma, h = ln(sigma / sigma').

Euler ancestral   x' = D + (s / sigma)(x - D) + u z,   u^2 = sigma'^2 (1 - rho^2),  s = sigma' rho
Heun              x' = x + (sigma' - sigma)/2 (slope + slope'),                       Karras et al. 2022, Algorithm 1
DPM-Solver++ 2M   x' = rho x + (1 - rho)(D + (D - D_1) h / 2 h_1),                    Lu et al. 2022, Algorithm 2
UniPC bh2         the same, and before the next one the state again with what it found: Zhao et al. 2023, Section 3
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distill_core.diffusion.schedulers.spec import SchedulerSpec
from distill_core.diffusion.steps import Step

Visited = Sequence[tuple[float, float]]  # (sigma, time), descending
FEW = 15  # steps below which DPM-Solver's last one is of first order


def ancestral(levels: Visited) -> list[Step]:
    """Euler's step to below the next level, and noise again up to it (k-diffusion's Euler ancestral)."""
    steps = []
    for (sigma, time), after in zip(levels, [*(one for one, _ in levels[1:]), 0.0]):
        above, below = (
            np.float32(sigma),
            np.float32(after),
        )  # diffusers' rounding shows where no signal is at first
        up = np.sqrt(below**2 * (above**2 - below**2) / above**2)
        rho = float(np.sqrt(below**2 - up**2)) / sigma
        steps.append(Step(sigma, time, (rho, 1 - rho, 0, 0), float(up)))
    return steps


def heun(levels: Visited) -> list[Step]:
    """Two evaluations for each step but the last, which goes to 0."""
    steps = []
    for (sigma, time), (after, time_after) in zip(levels, levels[1:]):
        rho, half = after / sigma, (after - sigma) / 2
        second = -half / after
        first = -half / sigma + half * (1 - rho) / after
        steps += [
            Step(sigma, time, (1, 0, 0, 0), ahead=(rho, 1 - rho, 0)),
            Step(after, time_after, (rho, second, first, 0)),
        ]
    return [*steps, Step(*levels[-1], (0, 1, 0, 0))]


def dpmpp_2m(spec: SchedulerSpec, levels: Visited, last: float, of: int) -> list[Step]:
    """DPM-Solver++ 2M, or its SDE; `of` is the number of steps that the levels are the last of."""
    steps = []
    ends = [*(sigma for sigma, _ in levels[1:]), last]
    for index, ((sigma, time), after) in enumerate(zip(levels, ends)):
        final = index == len(levels) - 1
        low = spec.euler_at_final or last == 0 or (spec.lower_order_final and of < FEW)
        back = None if index == 0 or (final and low) else math.log(levels[index - 1][0] / sigma)
        rho = after / sigma
        kept = rho**2 if spec.stochastic else rho
        turn = 0.0 if back is None else _second_order(spec, rho, back)
        up = after * math.sqrt(1 - rho**2) if spec.stochastic else 0.0
        steps.append(Step(sigma, time, (kept, 1 - kept + turn, -turn, 0), up))
    return steps


def _second_order(spec: SchedulerSpec, rho: float, back: float) -> float:
    """Coefficient of D - D_1."""
    h = -math.log(rho)
    if h == 0:  # the last level again
        return 0.0
    gone = 1 - rho**2 if spec.stochastic else 1 - rho
    if spec.solver_type == "midpoint":
        return gone / 2 * h / back
    return (1 - gone / (2 * h if spec.stochastic else h)) * h / back


def unipc(levels: Visited) -> list[Step]:
    """UniPC of order 2: the predictor is DPM-Solver++ 2M's, of first order in the first step and the last."""
    steps = []
    sigmas = [sigma for sigma, _ in levels]
    for index, (sigma, time) in enumerate(levels):
        state = (1.0, 0.0, 0.0, 0.0) if index == 0 else _corrected(sigmas, index)
        final = index == len(levels) - 1
        rho = 0.0 if final else sigmas[index + 1] / sigma
        turn = 0.0
        if index and not final:
            turn = (1 - rho) / 2 * -math.log(rho) / math.log(sigmas[index - 1] / sigma)
        steps.append(Step(sigma, time, state, ahead=(rho, 1 - rho + turn, -turn)))
    return steps


def _corrected(sigmas: Sequence[float], index: int) -> tuple[float, float, float, float]:
    """The state at a level from the one before and the answers at both, and at the one before these."""
    rho = sigmas[index] / sigmas[index - 1]
    h = -math.log(rho)
    if index == 1:
        return rho, (1 - rho) / 2, (1 - rho) / 2, 0.0
    ratio = -math.log(sigmas[index - 2] / sigmas[index - 1]) / h
    first = (1 - rho) / h - 1  # of -h: (e^-h - 1)/-h - 1, and the next of these functions
    second = first / -h - 0.5
    gone = rho - 1
    moment = np.array([first / gone, 2 * second / gone])
    earlier, own = (float(one) for one in np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], moment))
    turn = (1 - rho) * earlier / ratio
    new = (1 - rho) * own
    return rho, new, 1 - rho - new - turn, turn

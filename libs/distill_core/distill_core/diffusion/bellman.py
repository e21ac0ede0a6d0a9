"""Step sizes that are optimal for a walk that was recorded (BOSS, Nguyen et al. 2023, arXiv 2312.16414).

    C[i, j] = mean |k_j (J(x_i; l_i -> l_j) - x_j)|^2,  i < j       one step in the place of the walk from i to j
    V[i, 1] = C[i, K],   V[i, m] = min_j C[i, j] + V[j, m - 1]      the least sum of m of them from i to the end

x_i are the states of a walk on K intervals, J Euler's step with the prediction made there, k_j what the schedule
multiplies x at level l_j by before the network sees it. The sum ignores how an error grows on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def step_costs(
    states: Sequence[Tensor], predictions: Sequence[Tensor], levels: Sequence[float], scales: Sequence[float]
) -> Tensor:
    """C (K, K + 1) in float64, infinite where j <= i.

    Args:
        states: K + 1 of (B, ...), from the first level to the last.
        predictions: K of (B, ...), the x0 that was predicted at each state but the last.
        levels: K + 1 noise levels, descending.
        scales: K + 1 factors k_j.
    """
    count = len(predictions)
    costs = torch.full((count, count + 1), float("inf"), dtype=torch.float64)
    for i, (x, x0) in enumerate(zip(states, predictions)):
        for j in range(i + 1, count + 1):
            landed = x0 + levels[j] / levels[i] * (x - x0)
            costs[i, j] = scales[j] ** 2 * (landed - states[j]).double().square().mean()
    return costs


def bellman_grid(costs: Tensor, num_steps: int) -> tuple[int, ...]:
    """The `num_steps` + 1 states from 0 to K whose steps cost the least in sum; `costs` as `step_costs` has them.

    Raises:
        ValueError: more steps than intervals, or none.
    """
    count = len(costs)
    if not 1 <= num_steps <= count:
        raise ValueError(f"{num_steps} steps cannot be taken on {count} intervals")
    best, choices = costs[:, count], []
    for _ in range(num_steps - 1):
        onward = torch.cat([best, best.new_full((1,), float("inf"))])  # from the end nothing is left to do
        best, chosen = (costs + onward).min(1)
        choices.append(chosen)
    path = [0]
    for chosen in reversed(choices):
        path.append(int(chosen[path[-1]]))
    return (*path, count)


def even_grid(count: int, num_steps: int) -> tuple[int, ...]:
    """The `num_steps` + 1 states that part `count` intervals evenly, up to rounding."""
    return tuple(round(step * count / num_steps) for step in range(num_steps + 1))

"""The Bellman grid against every other grid, and its costs against a field whose steps are known."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from distill_core.diffusion.bellman import bellman_grid, even_grid, step_costs


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
def test_no_other_choice_of_steps_costs_less(num_steps):
    generator = torch.Generator().manual_seed(num_steps)
    costs = torch.rand(8, 9, generator=generator, dtype=torch.float64)
    costs = costs.masked_fill(torch.ones(8, 9).tril().bool(), float("inf"))

    def total(grid: tuple[int, ...]) -> float:
        return sum(float(costs[a, b]) for a, b in pairwise(grid))

    found = bellman_grid(costs, num_steps)
    assert len(found) == num_steps + 1
    every = [(0, *inner, 8) for inner in combinations(range(1, 8), num_steps - 1)]
    assert total(found) == pytest.approx(min(map(total, every)))
    assert total(found) < max(map(total, every)) or len(every) == 1


@pytest.mark.parametrize("num_steps", [0, 9])
def test_steps_that_the_walk_does_not_have_are_refused(num_steps):
    with pytest.raises(ValueError, match="cannot be taken on 8 intervals"):
        bellman_grid(torch.zeros(8, 9), num_steps)


def test_a_cost_is_how_far_one_step_lands_from_the_state_that_the_walk_reached():
    levels, scales = [3.0, 2.0, 0.0], [7.0, 0.25, 1.5]
    states = [torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[-0.5]])]
    predictions = [torch.tensor([[0.6]]), torch.tensor([[0.2]])]
    costs = step_costs(states, predictions, levels, scales)
    assert costs[0, 1] == pytest.approx((0.25 * (0.6 + 2 / 3 * 2.4 - 1.0)) ** 2)
    assert costs[0, 2] == pytest.approx((1.5 * (0.6 + 0.5)) ** 2)
    assert costs[1, 2] == pytest.approx((1.5 * (0.2 + 0.5)) ** 2)
    assert torch.isinf(costs[[0, 1, 1], [0, 0, 1]]).all()


def test_an_even_grid_has_both_ends_and_no_step_twice_the_size_of_another():
    assert even_grid(100, 4) == (0, 25, 50, 75, 100)
    grid = even_grid(11, 3)
    assert grid == (0, 4, 7, 11)

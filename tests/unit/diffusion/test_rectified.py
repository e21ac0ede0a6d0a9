"""Straight paths: velocities of known fields, the density of times, and how bent a path is."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.diffusion.rectified import deviation, draw_times, flow_time, level_of, velocity
from tests.oracles import AffineDenoiser


def test_a_level_and_its_time_lead_to_each_other():
    t = torch.tensor([0.001, 0.3, 0.9876])
    torch.testing.assert_close(flow_time(level_of(t)), t)
    torch.testing.assert_close(level_of(torch.tensor([0.75])), torch.tensor([3.0]))


def test_the_velocity_of_the_true_picture_is_the_noise_less_the_picture():
    torch.manual_seed(0)
    x0, eps, sigma = torch.randn(3, 1, 2, 5), torch.randn(3, 1, 2, 5), torch.tensor([0.2, 1.7, 60.0])
    x = x0 + sigma.reshape(3, 1, 1, 1) * eps
    torch.testing.assert_close(velocity(x, x0, sigma), eps - x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steepness", [0.7, 4.0])
def test_u_shaped_times_have_the_mean_and_the_tails_of_their_density(steepness):
    torch.manual_seed(0)
    t = draw_times(200_000, "u_shaped", steepness, torch.empty(0))
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    density = (steepness * grid).exp() + (steepness * (1 - grid)).exp()
    density /= density.sum()
    for power in (1, 2, 4):
        assert float((t.double() ** power).mean()) == pytest.approx(
            float((density * grid**power).sum()), abs=3e-3
        )
    below = float(density[grid < 0.1].sum())
    assert float((t < 0.1).double().mean()) == pytest.approx(below, abs=5e-3)
    assert below > 0.1


def test_uniform_times_are_the_plain_draw():
    torch.manual_seed(3)
    drawn = draw_times(5, "uniform", 4.0, torch.empty(0))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(5))


def levels(count: int, batch: int) -> list[torch.Tensor]:
    times = [10 / 11 * (1 - k / count) for k in range(count + 1)]
    return [torch.full((batch,), t / (1 - t)) for t in times]


def test_a_path_of_constant_velocity_is_straight_and_a_gaussian_s_is_not():
    torch.manual_seed(0)
    target, x = torch.randn(4, 1, 2, 3), 10 * torch.randn(4, 1, 2, 3)
    assert float(deviation(lambda x_sigma, sigma: target, x, levels(16, 4)).max()) < 1e-9
    bent = deviation(AffineDenoiser(0.4, 0.3), x, levels(400, 4))
    grid = torch.linspace(0, 10 / 11, 100_001, dtype=torch.float64)
    sigma = grid / (1 - grid)
    path = 0.4 + (x.double().reshape(-1, 1) - 0.4) * ((0.09 + sigma**2) / 100.09).sqrt()
    points = path / (1 + sigma)
    u = (points[:, 1:] - points[:, :-1]) / (grid[1] - grid[0])
    chord = (points[:, -1:] - points[:, :1]) / grid[-1]
    exact = (chord - u).square().mean(1).reshape(4, -1).mean(1)
    torch.testing.assert_close(bent.double(), exact, rtol=0.03, atol=1e-4)
    assert math.isfinite(float(bent.mean()))
    assert float(bent.mean()) > 1e-3

"""Solver steps against an exact Gaussian mixture: the order of their error, and the law of the stochastic one."""

from __future__ import annotations

import functools

import pytest
import torch

from distill_core.diffusion.solvers import SolverConfig, advance, between, walk
from tests.oracles import MixtureDenoiser

HIGH, LOW = 3.0, 0.3


@functools.cache
def problem():
    """A teacher, states and their levels, and where a thousand steps lead."""
    teacher = MixtureDenoiser()
    torch.manual_seed(0)
    x = teacher.samples(300) + HIGH * torch.randn(300, 1, 1, 2, dtype=torch.float64)
    high, low = (torch.full((300,), level, dtype=torch.float64) for level in (HIGH, LOW))
    exact = advance(teacher, x, high, low, SolverConfig(kind="heun", substeps=1000))
    return teacher, x, high, low, exact


def error(kind, steps):
    """Mean distance of `steps` steps from that."""
    teacher, x, high, low, exact = problem()
    found = advance(teacher, x, high, low, SolverConfig(kind=kind, substeps=steps))
    return float((found - exact).abs().mean())


@pytest.mark.parametrize(("kind", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_ode_solvers_converge_with_their_order(kind, order):
    coarse, fine = error(kind, 40), error(kind, 80)
    assert fine < 5e-3
    assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_the_stochastic_solver_ends_in_the_teachers_own_law():
    teacher = MixtureDenoiser()
    torch.manual_seed(1)
    count = 12_000
    x = teacher.samples(count) + HIGH * torch.randn(count, 1, 1, 2, dtype=torch.float64)
    high, low = (torch.full((count,), level, dtype=torch.float64) for level in (HIGH, LOW))
    real = teacher.samples(count) + LOW * torch.randn(count, 1, 1, 2, dtype=torch.float64)
    found = advance(teacher, x, high, low, SolverConfig(kind="sde", substeps=60, eta=1.0))
    torch.testing.assert_close(found.mean(0), real.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(found.flatten(1).T.cov(), real.flatten(1).T.cov(), atol=0.03, rtol=0)
    coarse = advance(teacher, x, high, low, SolverConfig(kind="sde", substeps=2, eta=1.0))
    assert (coarse.flatten(1).T.cov() - real.flatten(1).T.cov()).abs().max() > 0.06


def test_without_noise_of_its_own_the_stochastic_solver_is_the_deterministic_one():
    teacher = MixtureDenoiser()
    torch.manual_seed(2)
    x, sigma = teacher.samples(7), torch.linspace(0.2, 2, 7, dtype=torch.float64)
    one = advance(teacher, x, sigma, 0.3 * sigma, SolverConfig(kind="sde", eta=0.0, substeps=3))
    two = advance(teacher, x, sigma, 0.3 * sigma, SolverConfig(kind="ddim", substeps=3))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", ["ddim", "heun", "dpmpp_2m", "sde"])
def test_every_solver_reaches_the_data_where_an_items_next_level_is_zero(kind):
    teacher = MixtureDenoiser()
    torch.manual_seed(3)
    x = teacher.samples(6)
    sigma = torch.linspace(0.2, 2, 6, dtype=torch.float64)
    ends = torch.tensor([0.0, 0.1] * 3, dtype=torch.float64)
    state = advance(teacher, x, sigma, ends, SolverConfig(kind=kind, substeps=1))
    assert torch.isfinite(state).all()
    torch.testing.assert_close(state[::2], teacher(x, sigma)[::2])
    two = advance(teacher, x, sigma, ends, SolverConfig(kind=kind, substeps=2))
    assert torch.isfinite(two).all()
    assert not torch.equal(two, state)


def test_levels_by_frame_give_what_levels_by_item_give():
    def denoise(x, sigma):
        return 0.3 * x

    torch.manual_seed(4)
    x, sigma = torch.randn(3, 5, 2), torch.tensor([0.7, 1.1, 2.3])
    by_frame = sigma[:, None].expand(3, 5)
    for kind in ("ddim", "heun", "dpmpp_2m"):
        solver = SolverConfig(kind=kind, substeps=3)
        one = advance(denoise, x, sigma, 0.2 * sigma, solver)
        assert torch.equal(one, advance(denoise, x, by_frame, 0.2 * by_frame, solver))


def test_a_walk_gives_the_state_after_each_step():
    teacher = MixtureDenoiser()
    torch.manual_seed(5)
    x = teacher.samples(4)
    levels = between(
        torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), 0.1, dtype=torch.float64), 5
    )
    states = list(walk(teacher, x, levels, SolverConfig(kind="heun")))
    assert len(states) == 5
    whole = advance(teacher, x, levels[0], levels[-1], SolverConfig(kind="heun", substeps=5))
    torch.testing.assert_close(states[-1], whole)

"""Jumps between noise levels, their inverse and the forward process, by identities that hold for every sample."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.trajectory import eps_of, invert_jump, jump, parts, renoise
from tests.oracles import MixtureDenoiser


def points(seed=3):
    generator = torch.Generator().manual_seed(seed)
    x, x0 = (torch.randn(5, 2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.3, 1.7, 4.0, 9.0, 80.0], dtype=torch.float64)
    return x, x0, sigma


def test_a_prediction_at_a_point_jumps_back_to_that_point_and_to_its_end():
    x, x0, sigma = points()
    torch.testing.assert_close(jump(x, x0, sigma, sigma), x)
    torch.testing.assert_close(jump(x, x0, sigma, 0 * sigma), x0)
    lower = 0.37 * sigma
    torch.testing.assert_close(
        jump(x, x0, sigma, lower), x0 + lower[:, None, None, None] * eps_of(x, x0, sigma)
    )


def test_the_inverse_jump_finds_the_prediction_that_was_jumped():
    x, x0, sigma = points()
    for share in (0.0, 0.2, 0.9):
        y = jump(x, x0, sigma, share * sigma)
        torch.testing.assert_close(invert_jump(y, x, sigma, share * sigma), x0)


def test_levels_by_frame_are_levels_by_item_where_all_frames_share_one():
    x, x0, sigma = points()
    by_frame = sigma[:, None].expand(5, 2)
    for function, other in ((jump, x0), (invert_jump, x0)):
        one, two = function(x, other, sigma, 0.4 * sigma), function(x, other, by_frame, 0.4 * by_frame)
        assert torch.equal(one, two)
    ends = 0.4 * by_frame * torch.tensor([1.0, 0.0], dtype=torch.float64)
    moved = jump(x, x0, by_frame, ends)
    torch.testing.assert_close(moved[:, 1], x0[:, 1])
    torch.testing.assert_close(moved[:, 0], jump(x, x0, sigma, 0.4 * sigma)[:, 0])


def test_noise_on_noise_has_the_variance_of_the_higher_level():
    torch.manual_seed(0)
    low, high = torch.full((40_000,), 0.6), torch.full((40_000,), 1.9)
    x = torch.randn(40_000) * low
    assert renoise(x, low, high).std() == pytest.approx(1.9, rel=0.02)
    assert torch.equal(renoise(x, low, low), x)


def test_parts_of_an_exact_prediction_add_up():
    torch.manual_seed(0)
    teacher = MixtureDenoiser()
    x, sigma = teacher.samples(6), torch.linspace(0.1, 3, 6, dtype=torch.float64)
    both = parts(teacher, x, sigma)
    torch.testing.assert_close(both.x0 + sigma[:, None, None, None] * both.eps, x)

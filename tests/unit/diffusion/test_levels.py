"""Levels by item and by frame: what a frame is given is what the same frame alone would be given."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.levels import expand, mean_by_level
from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.losses.matching import eps_direction

VIDEO = (3, 4, 2, 5, 7)  # videos, frames, channels, height, width


def test_levels_broadcast_over_items_or_over_frames():
    like = torch.zeros(VIDEO)
    assert expand(torch.rand(3), like).shape == (3, 1, 1, 1, 1)
    assert expand(torch.rand(3, 4), like).shape == (3, 4, 1, 1, 1)


def test_what_shares_a_level_is_averaged():
    values = torch.arange(3.0 * 4 * 2).reshape(3, 4, 2)
    assert mean_by_level(values, torch.rand(3)).tolist() == [3.5, 11.5, 19.5]
    assert mean_by_level(values, torch.rand(3, 4)).tolist()[1] == [8.5, 10.5, 12.5, 14.5]


@pytest.mark.parametrize("kind", ["edm", "vp", "flow"])
def test_frames_with_levels_of_their_own_are_as_if_each_came_alone(kind):
    schedule = NoiseSchedule(kind, alphas_cumprod=torch.linspace(0.999, 0.01, 50) if kind == "vp" else None)
    generator = torch.Generator().manual_seed(3)
    x0, predicted = (torch.randn(VIDEO, generator=generator) for _ in range(2))
    sigma = schedule.sigma_at(torch.rand(3, 4, generator=generator) * 0.8 + 0.1)
    assert sigma.shape == (3, 4)
    torch.manual_seed(5)
    noisy = add_noise(x0, sigma)
    torch.manual_seed(5)
    alone = add_noise(x0.flatten(0, 1), sigma.flatten())
    assert torch.equal(noisy.flatten(0, 1), alone)
    assert torch.equal(schedule.network_time(sigma).flatten(), schedule.network_time(sigma.flatten()))
    loss = denoising_loss(predicted, x0, sigma, schedule)
    by_frame = denoising_loss(predicted.flatten(0, 1), x0.flatten(0, 1), sigma.flatten(), schedule)
    assert torch.allclose(loss, by_frame, rtol=1e-6)
    direction = eps_direction(predicted, x0, sigma)
    assert torch.equal(
        direction.flatten(0, 1), eps_direction(predicted.flatten(0, 1), x0.flatten(0, 1), sigma.flatten())
    )

"""Pairwise losses against torch's own densities and logistic function."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from distill_core.losses.pairwise import (
    clipped_log_ratio,
    margin_loss,
    noise_error,
    preference_loss,
    transition_log_density,
)


def test_the_noise_error_is_that_of_the_noise_a_prediction_implies():
    x0, eps, predicted = (torch.randn(3, 1, 4, 4) for _ in range(3))
    sigma = torch.tensor([0.1, 1.0, 5.0])
    x_sigma = x0 + sigma.reshape(-1, 1, 1, 1) * eps
    implied = (x_sigma - predicted) / sigma.reshape(-1, 1, 1, 1)
    expected = (implied - eps).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(noise_error(predicted, x0, sigma), expected, rtol=1e-4, atol=1e-5)


def test_the_preference_loss_is_the_logistic_one():
    gain = torch.randn(50)
    torch.testing.assert_close(preference_loss(gain, 3.0), -F.logsigmoid(3.0 * gain).mean())
    assert preference_loss(torch.zeros(4), 50.0).item() == pytest.approx(math.log(2))


def test_the_margin_loss_falls_with_the_gain_and_then_is_zero():
    gain = torch.tensor([-1.0, 0.1, 0.2, 5.0], requires_grad=True)
    loss = margin_loss(gain, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx((6.0 + 0.5) / 4)
    assert gain.grad.tolist() == [-1.25, -1.25, 0.0, 0.0]


@pytest.mark.parametrize("side", [2, 8])
def test_the_transition_density_is_the_mean_of_gaussian_log_densities(side):
    mean, x_next = torch.randn(5, 1, side, side), torch.randn(5, 1, side, side)
    expected = torch.distributions.Normal(mean, 0.7).log_prob(x_next).mean(dim=(1, 2, 3))
    torch.testing.assert_close(transition_log_density(mean, x_next, 0.7), expected)


def test_a_ratio_outside_the_clip_is_held_and_has_no_gradient():
    density = torch.tensor([-0.5, -0.05, 0.05, 0.5], requires_grad=True)
    ratio = clipped_log_ratio(density, torch.zeros(4), 0.1)
    ratio.sum().backward()
    torch.testing.assert_close(ratio.detach(), torch.tensor([math.log(0.9), -0.05, 0.05, math.log(1.1)]))
    assert density.grad.tolist() == pytest.approx([0.0, 1.0, 1.0, 0.0])

"""Losses of two items that are worked out by hand, each item with values of its own."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.losses.adversarial import approximate_r1, discriminator_loss, generator_loss
from distill_core.losses.denoising import add_noise, denoising_loss
from distill_core.losses.divergence import (
    TimeBinNormalizer,
    batch_normalised,
    density_ratio,
    divergence_weight,
)
from distill_core.losses.field_distillation import LossWeights, distance, weighted_sum
from distill_core.losses.matching import dm_direction, eps_direction, surrogate_loss
from distill_core.losses.pairwise import (
    clipped_log_ratio,
    margin_loss,
    noise_error,
    preference_loss,
    transition_log_density,
)

REAL, FAKE = torch.tensor([2.0, -0.7]), torch.tensor([0.3, 1.9])
SIGMA = torch.tensor([0.6, 3.0])
X0 = torch.tensor([[1.0, -2.0, 0.25], [0.4, 3.0, -1.2]]).reshape(2, 1, 1, 3)
OTHER = torch.tensor([[0.7, -1.1, 0.5], [2.4, 1.0, -2.2]]).reshape(2, 1, 1, 3)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# -- adversarial


def test_a_generator_wants_its_samples_to_look_real_and_a_discriminator_tells_them_apart():
    assert float(generator_loss(FAKE)) == pytest.approx((softplus(-0.3) + softplus(-1.9)) / 2)
    told = (softplus(0.3) + softplus(1.9)) / 2 + (softplus(-2.0) + softplus(0.7)) / 2
    assert float(discriminator_loss(REAL, FAKE)) == pytest.approx(told)


def test_the_penalty_is_the_mean_square_of_what_a_small_move_changes():
    assert float(approximate_r1(REAL, FAKE)) == pytest.approx((1.7**2 + 2.6**2) / 2)


# -- denoising and matching


def test_every_item_is_noised_to_its_own_level():
    torch.manual_seed(2)
    noise = torch.randn_like(X0)
    torch.manual_seed(2)
    noised = add_noise(X0, SIGMA)
    for item, sigma in enumerate(SIGMA.tolist()):
        assert torch.allclose(noised[item], X0[item] + sigma * noise[item])


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_a_denoising_loss_weighs_each_item_by_its_level(kind):
    schedule = NoiseSchedule(kind, sigma_data=0.7)
    errors = [(0.3**2 + 0.9**2 + 0.25**2) / 3, (2.0**2 + 2.0**2 + 1.0**2) / 3]
    weights = {
        "edm": [(s**2 + 0.49) / (s * 0.7) ** 2 for s in (0.6, 3.0)],
        "flow": [((1 + s) / s) ** 2 for s in (0.6, 3.0)],
    }[kind]
    expected = sum(w * e for w, e in zip(weights, errors)) / 2
    assert float(denoising_loss(OTHER, X0, SIGMA, schedule)) == pytest.approx(expected, rel=1e-5)


def test_the_direction_of_each_sample_is_scaled_by_its_own_distance_from_the_teacher():
    fake = torch.stack([OTHER[0] + 0.2, OTHER[1] - 0.4])
    found = dm_direction(fake, OTHER, X0)
    for item, (gap, far) in enumerate([(0.2, (0.3 + 0.9 + 0.25) / 3), (-0.4, 5.0 / 3)]):
        assert torch.allclose(found[item], torch.full((1, 1, 3), gap / far), atol=1e-6)


def test_the_direction_of_score_distillation_has_the_variance_preserving_factor():
    found = eps_direction(OTHER, X0, SIGMA)
    for item, factor in enumerate([0.6 / 1.36, 3.0 / 10]):
        assert torch.allclose(found[item], factor * (OTHER - X0)[item], atol=1e-6)


def test_the_gradient_of_the_surrogate_is_the_direction_over_the_number_of_values():
    x0 = X0.clone().requires_grad_(True)
    surrogate_loss(x0, OTHER).backward()
    assert torch.allclose(x0.grad, OTHER / 6, atol=1e-6)


# -- divergences


@pytest.mark.parametrize(
    ("divergence", "second"),  # f''(r), from the table of f
    [
        ("reverse_kl", lambda r: 1 / r**2),
        ("softened_reverse_kl", lambda r: 1 / (r**2 * (1 + r))),
        ("jensen_shannon", lambda r: 1 / (r * (1 + r))),
        ("squared_hellinger", lambda r: r**-1.5 / 4),
        ("forward_kl", lambda r: 1 / r),
        ("jeffreys", lambda r: 1 / r + 1 / r**2),
        ("neyman", lambda r: 2 / r**3),
    ],
)
def test_a_weight_is_the_second_derivative_times_the_squared_ratio(divergence, second):
    ratio = torch.tensor([0.3, 1.7, 6.0], dtype=torch.float64)
    assert torch.allclose(divergence_weight(divergence, ratio), second(ratio) * ratio**2)


def test_a_ratio_is_the_exponential_of_the_logit_within_its_bounds_and_has_no_gradient():
    logits = torch.tensor([-5.0, 0.4, 40.0], requires_grad=True)
    ratio = density_ratio(logits, 0.2, 9.0)
    assert ratio.tolist() == pytest.approx([0.2, math.exp(0.4), 9.0])
    assert not ratio.requires_grad


def test_weights_over_their_mean_have_the_mean_one():
    assert batch_normalised(torch.tensor([1.0, 2.0, 6.0])).tolist() == pytest.approx([1 / 3, 2 / 3, 2.0])


def test_ratios_are_divided_by_the_running_mean_of_their_level():
    normalise = TimeBinNormalizer(torch.tensor([0.0, 1.0, 4.0, 9.0]), decay=0.8)
    sigma = torch.tensor([0.5, 0.7, 2.0])
    first = normalise(torch.tensor([1.0, 3.0, 5.0]), sigma)
    assert first.tolist() == pytest.approx([1 / 2, 3 / 2, 1.0], rel=1e-5)
    assert normalise.means.tolist() == pytest.approx([2.0, 5.0, 0.0])
    second = normalise(torch.tensor([7.0, 4.0]), torch.tensor([0.2, 6.0]))
    assert normalise.means.tolist() == pytest.approx([0.8 * 2 + 0.2 * 7, 5.0, 4.0])
    assert second.tolist() == pytest.approx([7 / 3, 1.0], rel=1e-5)


# -- pairs


def test_the_error_of_the_noise_is_that_of_the_picture_over_the_squared_level():
    errors = [(0.3**2 + 0.9**2 + 0.25**2) / 3 / 0.36, 3.0 / 9]
    assert noise_error(OTHER, X0, SIGMA).tolist() == pytest.approx(errors, rel=1e-5)


def test_a_preference_is_softly_and_a_margin_strictly_asked_for():
    gain = torch.tensor([0.3, -1.4])
    assert float(preference_loss(gain, 2.5)) == pytest.approx((softplus(-0.75) + softplus(3.5)) / 2)
    assert float(margin_loss(gain, 2.5)) == pytest.approx((0.25 + 4.5) / 2)


def test_the_density_of_a_transition_is_the_normal_one_for_each_element():
    expected = torch.distributions.Normal(X0, 1.7).log_prob(OTHER).flatten(1).mean(1)
    assert torch.allclose(transition_log_density(X0, OTHER, 1.7), expected)


def test_a_ratio_of_densities_is_held_near_one_and_has_no_gradient_beyond():
    density = torch.tensor([0.1, 0.9, -2.0], requires_grad=True)
    found = clipped_log_ratio(density, torch.zeros(3), 0.3)
    assert found.tolist() == pytest.approx([0.1, math.log(1.3), math.log(0.7)])
    found.sum().backward()
    assert density.grad.tolist() == pytest.approx([1.0, 0.0, 0.0])


# -- fields


def test_terms_are_weighed_by_stage_and_the_feature_s_weight_decays():
    weights = LossWeights(feature=3.0, feature_decay=0.9, density=0.5, color=0.7, pixel=10.0, late=0.2)
    terms = {
        name: torch.tensor(value) for name, value in [("feature", 2.0), ("density", 3.0), ("color", 5.0)]
    }
    early = 3.0 * 0.9**4 * 2.0 + 0.5 * 3.0 + 0.7 * 5.0
    assert float(weighted_sum(terms, weights, 4)) == pytest.approx(early)
    late = 3.0 * 0.9**4 * 2.0 + 0.2 * (0.5 * 3.0 + 0.7 * 5.0) + 10.0 * 1.1
    assert float(weighted_sum({**terms, "pixel": torch.tensor(1.1)}, weights, 4)) == pytest.approx(late)


def test_a_distance_is_the_mean_square_or_the_norm_and_zero_of_nothing():
    assert float(distance(X0, OTHER, "mean")) == pytest.approx((0.3**2 + 0.9**2 + 0.25**2 + 9.0) / 6)
    assert float(distance(X0, OTHER, "norm")) == pytest.approx(math.sqrt(0.3**2 + 0.9**2 + 0.25**2 + 9.0))
    nothing = torch.zeros(0, 2, requires_grad=True)
    distance(nothing, torch.zeros(0, 2), "mean").backward()
    assert nothing.grad.shape == (0, 2)

"""Distances by item, against their formulas and limits."""

from __future__ import annotations

import pytest
import torch

from distill_core.losses.distance import DISTANCES, huber, huber_norm, l2, truncated_snr

A, B = torch.tensor([[[3.0, 1.0, 0.0]], [[0.0, 0.002, 0.0]]]), torch.zeros(2, 1, 3)


def test_distances_are_what_their_formulas_say():
    assert l2(A, B).tolist() == pytest.approx([10 / 3, 4e-6 / 3])
    c = 0.1
    by_hand = sum((d * d + c * c) ** 0.5 - c for d in (3.0, 1.0, 0.0)) / 3
    assert float(huber(A, B, c)[0]) == pytest.approx(by_hand)
    assert float(huber_norm(A, B, c)[0]) == pytest.approx(((10 + 0.09) ** 0.5 - 0.3) / 3)


def test_a_huber_distance_is_quadratic_near_zero_and_linear_far_away():
    for distance in (huber, huber_norm):
        near, twice = (float(distance(B[:1] + e, B[:1], 0.1)[0]) for e in (2e-3, 4e-3))
        assert twice / near == pytest.approx(4, rel=0.02)
        far, twice = (float(distance(B[:1] + e, B[:1], 0.1)[0]) for e in (500.0, 1000.0))
        assert twice / far == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_equal_batches_have_no_distance_and_a_finite_slope(name):
    a = A.clone().requires_grad_(True)
    value = DISTANCES[name](a, A)
    assert value.abs().max() < 1e-6
    value.sum().backward()
    assert torch.isfinite(a.grad).all()


def test_the_truncated_weight_is_the_larger_of_the_two_errors():
    sigma, error = torch.tensor([0.25, 0.8, 3.0]), 0.37
    assert (truncated_snr(sigma) * error).tolist() == pytest.approx(
        [max(error, error / float(s) ** 2) for s in sigma]
    )

import numpy as np
import pytest
import scipy.linalg
import torch

from distill_core.errors import DataError
from distill_core.metrics.frechet import coverage, frechet_distance, precision_recall


def normal(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_have_no_distance():
    x = normal(200, 8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_squared_length():
    x = normal(200, 8)
    assert frechet_distance(x, x + 3) == pytest.approx(9 * 8, rel=1e-5)


def test_it_equals_the_closed_form_of_scaled_gaussians():
    x = normal(500, 4)
    x = (x - x.mean(0)).double()
    variance = torch.cov(x.T).trace().item()
    assert frechet_distance(x, 3 * x) == pytest.approx((3 - 1) ** 2 * variance, rel=1e-9)


def test_it_agrees_with_the_general_matrix_square_root():
    a, b = normal(300, 6, seed=1) @ normal(6, 6, seed=2), normal(400, 6, seed=3) @ normal(6, 6, seed=4) + 0.5
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted, rel=1e-8)


def test_fewer_samples_than_features_are_no_problem():
    a, b = normal(5, 32), normal(7, 32, seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert np.isfinite(frechet_distance(a, b))


def test_a_single_feature_works():
    x = normal(100, 1)
    assert frechet_distance(x, x + 2) == pytest.approx(4, rel=1e-5)


def test_coverage_is_one_for_the_same_set_and_zero_far_away():
    x = normal(100, 4)
    assert coverage(x, x) == 1
    assert coverage(x, x + 100) == 0


def test_coverage_drops_with_lost_modes_where_precision_does_not():
    left, right = normal(200, 2) - 20, normal(200, 2, seed=1) + 20
    real, fake = torch.cat([left, right]), normal(400, 2, seed=2) - 20
    precision, recall = precision_recall(real, fake)
    assert coverage(real, fake) < 0.55
    assert precision > 0.9
    assert recall < 0.55


def test_coverage_counts_balls_by_hand():
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    fake = torch.tensor([[1.5]])  # within 1 of the item at 1 only
    assert coverage(real, fake.repeat(2, 1), k=1) == 0.25


def test_chunks_do_not_change_the_figure(monkeypatch):
    a, b = normal(50, 3), normal(60, 3, seed=1)
    whole = coverage(a, b), precision_recall(a, b)
    monkeypatch.setattr("distill_core.metrics.frechet._CHUNK", 7)
    assert (coverage(a, b), precision_recall(a, b)) == whole


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(1, 3), torch.ones(5, 3), "1 samples are too few"),
        (torch.ones(5, 2), torch.ones(5, 3), "cannot be compared"),
        (torch.ones(5), torch.ones(5), "cannot be compared"),
        (torch.full((5, 3), float("nan")), torch.ones(5, 3), "NaN or infinity"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(a, b, message):
    with pytest.raises(DataError, match=message):
        frechet_distance(a, b)

import numpy as np
import pytest
import scipy.linalg
import torch

from distill_core.errors import DataError
from distill_core.metrics.frechet import (
    NEIGHBOURS,
    FeatureSet,
    frechet_distance,
    kernel_distance,
    neighbours,
    set_figures,
)


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


def test_the_kernel_distance_is_the_unbiased_estimate_written_out():
    a, b = normal(9, 4).double(), normal(7, 4, seed=1).double() + 0.5

    def kernel(x, y):
        return (float(x @ y) / 4 + 1) ** 3

    def inside(rows):
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    assert kernel_distance(a, b) == pytest.approx(inside(a) + inside(b) - 2 * across, rel=1e-9)


def test_the_kernel_distance_of_one_distribution_is_about_nothing_and_grows_with_a_shift():
    a, b = normal(800, 8), normal(800, 8, seed=1)
    assert abs(kernel_distance(a, b)) < 0.02
    assert kernel_distance(a, b + 1) > 1


def test_the_same_set_is_precise_and_complete_and_one_far_away_is_neither():
    x = normal(100, 4)
    same, away = neighbours(x, x), neighbours(x, x + 100)
    assert same[:2] == (1, 1)
    assert same.coverage == 1
    assert same.density == pytest.approx((NEIGHBOURS + 1) / NEIGHBOURS)  # each ball holds its own centre too
    assert away == (0, 0, 0, 0)


def test_a_lost_mode_costs_recall_and_coverage_but_no_precision():
    left, right = normal(200, 2) - 20, normal(200, 2, seed=1) + 20
    real, fake = torch.cat([left, right]), normal(400, 2, seed=2) - 20
    found = neighbours(real, fake)
    assert found.precision > 0.9
    assert found.recall < 0.55
    assert found.coverage < 0.55


def test_invented_samples_cost_precision_but_no_recall():
    real = normal(300, 2)
    fake = torch.cat([normal(300, 2, seed=1), normal(300, 2, seed=2) + 50])
    found = neighbours(real, fake)
    assert found.precision == pytest.approx(0.5, abs=0.05)
    assert found.recall > 0.9


def test_an_outlier_among_the_real_ones_cannot_make_density_large_as_it_does_precision():
    real = torch.cat([normal(200, 2), torch.tensor([[1000.0, 0.0]])])  # its ball reaches everything
    fake = normal(200, 2, seed=1) + 100
    found = neighbours(real, fake)
    assert found.precision == 1
    assert found.density == pytest.approx(1 / NEIGHBOURS)


def test_all_four_agree_with_balls_counted_one_by_one():
    real, fake = normal(40, 3).double(), normal(30, 3, seed=1).double() * 1.5
    radius = {}
    for name, points in (("real", real), ("fake", fake)):
        radius[name] = [sorted(float((p - q).norm()) for q in points)[NEIGHBOURS] for p in points]
    in_real = [[float((f - r).norm()) <= radius["real"][i] for i, r in enumerate(real)] for f in fake]
    in_fake = [[float((r - f).norm()) <= radius["fake"][j] for j, f in enumerate(fake)] for r in real]
    found = neighbours(real, fake)
    assert found.precision == pytest.approx(sum(map(any, in_real)) / 30)
    assert found.recall == pytest.approx(sum(map(any, in_fake)) / 40)
    assert found.density == pytest.approx(sum(map(sum, in_real)) / (30 * NEIGHBOURS))
    assert found.coverage == pytest.approx(sum(map(any, zip(*in_real))) / 40)


def test_chunks_do_not_change_the_figures_and_bound_the_memory(monkeypatch):
    a, b = normal(50, 3), normal(60, 3, seed=1)
    whole = set_figures(a, b)
    largest = []
    cdist = torch.cdist
    monkeypatch.setattr("distill_core.metrics.frechet._ENTRIES", 7 * 60)
    monkeypatch.setattr(torch, "cdist", lambda x, y: largest.append(len(x) * len(y)) or cdist(x, y))
    assert set_figures(a, b) == pytest.approx(whole, rel=1e-9)
    assert max(largest) <= 7 * 60


def test_what_a_set_needs_is_computed_once(monkeypatch):
    real, calls = FeatureSet(normal(50, 3)), []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: calls.append(1) or eigh(x))
    for seed in (1, 2, 3):
        frechet_distance(real, normal(50, 3, seed=seed))
    assert len(calls) == 4  # one for the real set, one for each other


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


def test_neighbours_need_more_samples_than_there_are_in_a_ball():
    with pytest.raises(DataError, match="give at least 6"):
        neighbours(normal(5, 2), normal(50, 2))

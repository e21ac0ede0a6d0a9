"""Self-distillation of kernel regression against the published toy, its limit, and scikit-learn's kernel ridge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from distill_core.methods.recognition.self_distill_kernel import best_alpha, limit, mixed_targets
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import tiny_trainer

# 11 points of the paper's illustration (gamma 80, ridge 0.2) and its losses by round, from its repository's README
Y = [0.38476636, 1.23339677, 1.33232242, 0.69201595, -0.29756146, -0.24189292, -0.79644858, -0.9616480, -0.49672510,
     -0.34690660, 0.55895127]  # fmt: skip
LOSSES = {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948),
}
LIMITS = {0.0: 0.49505, 0.35: 0.14959}


def toy() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    x = torch.arange(11, dtype=torch.float64)[:, None] / 10
    args = {"shape": [1], "num_classes": 1, "num_items": 11, "gamma": 80.0}
    machine = build_network(NetworkConfig(name="kernel_machine", args=args))
    machine.items.copy_(x)
    return machine, machine.kernel(x), torch.tensor(Y, dtype=torch.float64)[:, None]


def loss(machine: torch.nn.Module, coefficients: torch.Tensor) -> float:
    grid = torch.arange(0, 1.005, 0.01, dtype=torch.float64)[:, None]
    return float((machine.kernel(grid) @ coefficients - torch.sin(2 * torch.pi * grid)).square().mean())


@pytest.mark.parametrize("alpha", LOSSES)
def test_the_rounds_of_the_papers_illustration_have_its_losses(alpha):
    machine, kernel, y = toy()
    last, ridge = y, 0.2 * torch.eye(11, dtype=torch.float64)
    for expected in LOSSES[alpha]:
        coefficients = torch.linalg.solve(kernel + ridge, mixed_targets(y, last, alpha))
        last = kernel @ coefficients
        assert loss(machine, coefficients) == pytest.approx(expected, abs=6e-6)
    assert loss(machine, limit(kernel, y, 0.2, alpha)) == pytest.approx(LIMITS[alpha], abs=6e-6)


def test_many_rounds_come_to_the_limit_which_is_ridge_regression_with_a_larger_ridge():
    _, kernel, y = toy()
    last, ridge, alpha = y, 0.2 * torch.eye(11, dtype=torch.float64), 0.35
    for _ in range(80):
        coefficients = torch.linalg.solve(kernel + ridge, mixed_targets(y, last, alpha))
        last = kernel @ coefficients
    torch.testing.assert_close(coefficients, limit(kernel, y, 0.2, alpha), rtol=0, atol=1e-12)
    ours = kernel @ limit(kernel, y, 0.2, alpha)
    theirs = KernelRidge(alpha=0.2 / alpha, kernel="precomputed").fit(kernel.numpy(), y.numpy())
    np.testing.assert_allclose(ours.numpy(), theirs.predict(kernel.numpy()), rtol=0, atol=1e-12)


def test_the_best_weight_is_the_best_of_a_fine_grid():
    generator = torch.Generator().manual_seed(3)
    truth, guided, unguided = (torch.randn(7, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    guided = truth + 0.3 * guided
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    errors = [float((truth - a * guided - (1 - a) * unguided).square().sum()) for a in grid]
    assert best_alpha(truth, guided, unguided) == pytest.approx(float(grid[int(np.argmin(errors))]), abs=3e-4)
    assert best_alpha(truth, truth - (guided - truth), truth) in (0.0, 1.0)  # clipped


def test_a_job_in_closed_form_publishes_what_it_fitted_and_resumes_exactly(context, tmp_path):
    changes = {"steps": 4, "ema": {"machine": 0.9}, "data.only": [3, 8], "data.validation.only": [3, 8]}
    straight = tiny_trainer("self_distill_kernel", context, tmp_path / "a", **changes)
    straight.train()
    with straight.averaged():  # the EMA is the fit itself, not its average with the zeros it began as
        fitted = straight.method.machine.network.coefficients.detach().clone()
    assert torch.equal(fitted, straight.method.machine.network.coefficients)
    assert fitted.abs().max() > 0.01
    polls = iter([False, False, True])
    first = tiny_trainer("self_distill_kernel", context, tmp_path / "b", **changes)
    assert first.train(lambda: next(polls)).stopped
    second = tiny_trainer("self_distill_kernel", context, tmp_path / "b", **changes)
    second.train()
    assert torch.equal(
        second.method.machine.network.coefficients, straight.method.machine.network.coefficients
    )

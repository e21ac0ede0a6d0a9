"""Samplers against a Gaussian, whose denoiser and ODE are known exactly; and torch against NumPy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from distill_core.diffusion.guidance import guide
from distill_core.diffusion.noise import unit_normal
from distill_core.diffusion.sampling import SamplerSpec, karras_levels, sample
from distill_core.errors import ConfigError

MEAN, STD = 0.7, 0.4
START = (1 + 20.0**2) ** 0.5  # as of a variance-preserving model: not the first level itself
PINNED = [0.11655652, -0.68353242, 0.09819598, -0.29281077]
PINNED_ELSEWHERE = [-2.03860855, -0.49145168, -0.36586556, -1.44782233]  # of another seed, image and draw


def gaussian_denoiser(x, sigma):
    """E[x0 | x_sigma] for x0 ~ N(MEAN, STD^2)."""
    return MEAN + (x - MEAN) * (STD**2 / (STD**2 + sigma**2))


def spec(kind: str, **values: object) -> SamplerSpec:
    defaults = {"sigma_min": 0.002, "sigma_max": 20.0, "noise_scale": START, "num_steps": 32, "max_steps": 64}
    return SamplerSpec(kind=kind, **{**defaults, **values})


def exact_end(noise):
    """The probability-flow ODE of a Gaussian scales deviations from the mean by STD / sqrt(STD^2 + sigma^2)."""
    return MEAN + (START * noise - MEAN) * STD / np.sqrt(STD**2 + 20.0**2)


def error(kind: str, steps: int) -> float:
    noise = unit_normal(0, 0, 0, (1000,))
    return float(
        np.abs(sample(gaussian_denoiser, spec(kind), lambda k: noise, steps) - exact_end(noise)).mean()
    )


@pytest.mark.parametrize(("kind", "order"), [("heun", 2), ("euler", 1)])
def test_the_ode_solvers_converge_to_the_exact_solution_with_their_order(kind, order):
    fine = error(kind, 64)
    assert fine < 0.02
    assert fine == pytest.approx(error(kind, 32) / 2**order, rel=0.2)


def test_euler_keeps_its_digits_however_high_it_begins():
    """At flow time 1 the level is a million: x and D differ by as much, and the picture is of size 1."""
    noise = unit_normal(7, 0, 0, (1000,))
    high = spec("euler", sigma_min=0.05, sigma_max=1e6, noise_scale=1e6)
    single = sample(gaussian_denoiser, high, lambda k: noise, 4)
    double = sample(gaussian_denoiser, high, lambda k: noise.astype(np.float64), 4)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=1e-6)


def test_few_step_renoises_with_its_own_draw():
    levels = (20.0, 1.5, 0.6)
    seen = []

    def denoise(x, sigma):
        seen.append(sigma)
        return gaussian_denoiser(x, sigma)

    draws = {k: unit_normal(3, 0, k, (10,)) for k in (0, 1, 2)}
    few = spec("few_step", sigmas=levels, num_steps=3, max_steps=3)
    found = sample(denoise, few, lambda k: draws[k], 3)
    first = gaussian_denoiser(START * draws[0], 20.0)
    second = gaussian_denoiser(first + 1.5 * draws[1], 1.5)
    assert seen == [20.0, 1.5, 0.6]
    np.testing.assert_allclose(found, gaussian_denoiser(second + 0.6 * draws[2], 0.6), rtol=1e-6)


def test_torch_and_numpy_give_the_same_sample():
    noise = unit_normal(5, 2, 0, (3, 8, 8))
    one = sample(gaussian_denoiser, spec("heun"), lambda k: noise, 8)
    two = sample(gaussian_denoiser, spec("heun"), lambda k: torch.from_numpy(noise), 8)
    np.testing.assert_allclose(one, two.numpy(), atol=1e-5)


def test_karras_levels_fall_from_the_highest_to_the_lowest():
    levels = karras_levels(10, sigma_min=0.01, sigma_max=5.0)
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(5.0)
    assert levels[-1] == pytest.approx(0.01)
    third = (5.0 ** (1 / 3) + (0.01 ** (1 / 3) - 5.0 ** (1 / 3)) * 2 / 9) ** 3
    assert karras_levels(10, sigma_min=0.01, sigma_max=5.0, rho=3.0)[2] == pytest.approx(third)
    assert spec("heun", rho=3.0).levels(10)[2] != pytest.approx(spec("heun").levels(10)[2], rel=0.1)


@pytest.mark.parametrize("steps", [0, -3, 65, 10**9])
def test_a_number_of_steps_out_of_range_is_refused_by_name(steps):
    with pytest.raises(ConfigError, match=r"num_steps = -?\d+ is not allowed.*1 to 64") as error:
        spec("heun").levels(steps)
    assert error.value.field == "num_steps"


def test_a_distilled_student_refuses_another_guidance():
    student = spec("few_step", sigmas=(5.0,), guidable=False)
    student.check_guidance(1.0)
    with pytest.raises(ConfigError, match="distilled at a fixed guidance"):
        student.check_guidance(3.0)


def test_guidance_one_is_the_conditional_prediction_and_zero_the_unconditional():
    cond, uncond = np.array([2.0]), np.array([1.0])
    assert guide(cond, uncond, 1.0) == cond
    assert guide(cond, uncond, 0.0) == uncond
    assert guide(cond, uncond, 3.0) == pytest.approx(4.0)


def test_noise_is_standard_normal_and_a_function_of_its_numbers_alone():
    noise = unit_normal(1, 2, 3, (200_000,))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert np.isfinite(noise).all()
    np.testing.assert_array_equal(noise[:7], unit_normal(1, 2, 3, (200_000,))[:7])
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert abs(np.corrcoef(noise, unit_normal(*other, (200_000,)))[0, 1]) < 0.02


def test_noise_values_are_pinned():
    """Published models and tests elsewhere rely on these very numbers."""
    found = unit_normal(0, 0, 0, (4,))
    np.testing.assert_allclose(found, PINNED, rtol=1e-6)
    np.testing.assert_allclose(unit_normal(3, 5, 2, (4,)), PINNED_ELSEWHERE, rtol=1e-6)


def test_sampling_imports_no_torch():
    code = "import sys, distill_core.artifacts, distill_core.diffusion.noise; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )

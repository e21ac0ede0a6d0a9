"""The few-step sampler between fresh noise at every level and the ODE's own chain."""

from __future__ import annotations

import numpy as np
import pytest

from distill_core.diffusion.noise import unit_normal
from distill_core.diffusion.sampling import SamplerSpec, few_step, sample
from distill_core.diffusion.steps import euler, follow

LEVELS = [9.0, 2.5, 0.7, 0.2]


def denoiser(x, sigma):
    """E[x0 | x_sigma] for x0 ~ N(0.7, 0.4^2)."""
    return 0.7 + (x - 0.7) * (0.16 / (0.16 + sigma**2))


def draw(k):
    return unit_normal(3, 1, k, (5000,))


def test_without_fresh_noise_a_few_step_student_walks_eulers_chain():
    x = draw(0) * LEVELS[0]
    chain = few_step(denoiser, x, LEVELS, draw, eta=0.0)
    np.testing.assert_allclose(
        chain, follow(denoiser, x, euler([(level, None) for level in LEVELS]), draw), atol=1e-5
    )
    assert np.abs(chain - few_step(denoiser, x, LEVELS, draw)).mean() > 0.05


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_each_level_gets_its_own_variance_whatever_the_share_of_fresh_noise(eta):
    seen = []

    def nothing(x, sigma):
        seen.append(float(x.std()) / sigma)
        return 0 * x

    spec = SamplerSpec(
        kind="few_step", sigmas=tuple(LEVELS), noise_scale=LEVELS[0], num_steps=4, max_steps=4, eta=eta
    )
    sample(nothing, spec, draw, 4)
    assert seen == pytest.approx([1.0] * 4, rel=0.05)

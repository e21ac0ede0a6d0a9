"""Tables of steps: the order of the multistep solvers, torch against NumPy, and how the network is called."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from distill_core.diffusion.sampling import SamplerSpec, sample
from distill_core.diffusion.schedulers import path
from distill_core.diffusion.steps import Step, follow
from distill_core.networks.foreign.samplers import scheduler_spec

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("cls", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
def test_multistep_solvers_converge_with_order_two_on_a_mixture_of_gaussians(cls):
    """Its denoiser is known exactly; the end of the flow is taken from a thousand steps of Heun's method."""
    means, std = np.array([-1.3, 0.9]), 0.4

    def denoise(x, sigma, time=None):
        total = std**2 + sigma**2
        logits = -((x[..., None] - means) ** 2) / (2 * total) + np.log([0.3, 0.7])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights * (means + (x[..., None] - means) * std**2 / total)).sum(-1)

    spec = scheduler_spec(cls(**SD, use_karras_sigmas=True))
    z = np.random.default_rng(4).normal(size=400)
    ends = path(spec, 50, (1, 1)).steps
    high, low = ends[0].sigma, ends[-1].sigma
    fine = SamplerSpec(
        kind="heun",
        sigma_min=low,
        sigma_max=high,
        noise_scale=path(spec, 5, (1, 1)).start,
        num_steps=1,
        max_steps=2000,
    )
    exact = sample(denoise, fine, lambda k: z, 1000)

    def error(count):
        steps = path(spec, count, (1, 1))
        return np.abs(follow(denoise, z * steps.start, steps.steps, lambda k: z) - exact).mean()

    assert error(80) < 1e-3
    assert error(40) / error(80) > 3.2  # 2 for a solver of first order


def test_the_steps_are_the_same_in_torch_and_numpy():
    spec = scheduler_spec(
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    )
    z, steps = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32), path(spec, 5, (6, 10))

    def denoise(x, sigma, time):
        return x * (0.4 / (1 + sigma))

    one = follow(denoise, z * np.float32(steps.start), steps.steps, lambda k: z)
    two = follow(denoise, torch.from_numpy(z) * steps.start, steps.steps, lambda k: torch.from_numpy(z))
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, two.numpy(), rtol=1e-5, atol=1e-6)


def test_a_step_without_a_time_calls_the_network_without_one():
    seen = []

    def denoise(*arguments):
        seen.append(arguments[1:])
        return arguments[0]

    steps = [Step(3.0, 0.0, (0, 1, 0, 0)), Step(2.0, None, (0, 1, 0, 0))]
    follow(denoise, np.zeros(2), steps, lambda k: np.zeros(2))
    assert seen == [(3.0, 0.0), (2.0,)]

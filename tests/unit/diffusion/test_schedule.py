"""Conversions at the door, against diffusers' own schedulers and closed forms."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill_core.diffusion.schedule import NoiseSchedule, to_x0
from distill_core.networks.diffusers_denoiser import schedule_of


@pytest.fixture
def noised():
    torch.manual_seed(0)
    x0, eps = torch.randn(16, 3, 4, 6), torch.randn(16, 3, 4, 6)
    return x0, eps


SIGMA_DATA = 0.7  # of the EDM form; at 0.5 a factor could be a square
LEVELS = torch.logspace(-2, 1.2, 16)  # another one for each item


@pytest.mark.parametrize("timestep", [0, 10, 500, 998])
def test_a_discrete_schedule_sees_what_diffusers_would_feed_its_network(timestep, noised):
    x0, eps = noised
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear")
    schedule = schedule_of(scheduler)
    sigma = schedule.sigma_at(torch.full((16,), timestep / 999))
    x_sigma = x0 + sigma.reshape(-1, 1, 1, 1) * eps
    times = torch.full((16,), timestep)
    fed = x_sigma * schedule.scale(sigma).reshape(-1, 1, 1, 1)
    assert torch.allclose(fed, scheduler.add_noise(x0, eps, times), atol=2e-4)
    assert torch.allclose(schedule.network_time(sigma), times.float(), atol=0.02)


def test_edm_agrees_with_diffusers_preconditioning(noised):
    x0, eps = noised
    scheduler = diffusers.EDMEulerScheduler(sigma_data=SIGMA_DATA)
    schedule = schedule_of(scheduler)
    wide = LEVELS.reshape(-1, 1, 1, 1)
    x_sigma = x0 + wide * eps
    output = torch.randn_like(x0)
    fed = scheduler.precondition_inputs(x_sigma, wide)
    assert torch.allclose(x_sigma * schedule.scale(LEVELS).reshape(-1, 1, 1, 1), fed, atol=1e-6)
    ours = to_x0(output, x_sigma, wide, "edm", SIGMA_DATA)
    assert torch.allclose(ours, scheduler.precondition_outputs(x_sigma, output, wide), atol=1e-5)
    assert torch.allclose(schedule.network_time(LEVELS), scheduler.precondition_noise(LEVELS), atol=1e-6)


def test_a_flow_network_is_fed_the_mixture_at_its_time_in_thousandths(noised):
    x0, eps = noised
    t = torch.linspace(0.01, 0.99, 16)
    sigma, wide = t / (1 - t), t.reshape(-1, 1, 1, 1)
    schedule = NoiseSchedule("flow")
    fed = (x0 + sigma.reshape(-1, 1, 1, 1) * eps) * schedule.scale(sigma).reshape(-1, 1, 1, 1)
    assert torch.allclose(fed, (1 - wide) * x0 + wide * eps, atol=1e-5)
    assert torch.allclose(schedule.network_time(sigma), 1000 * t, rtol=1e-4)


def test_a_time_between_two_timesteps_is_interpolated():
    schedule = schedule_of(diffusers.DDPMScheduler(beta_schedule="linear"))
    times = torch.tensor([0.25, 10.5, 500.75, 998.4])
    assert torch.allclose(schedule.network_time(schedule.sigma_at(times / 999)), times, atol=0.02)


@pytest.mark.parametrize("sigma", [0.01, 0.7, 14.0])
def test_every_parameterisation_gives_back_x0_from_the_true_output(sigma, noised):
    x0, eps = noised
    level = torch.full((16, 1, 1, 1), sigma)
    x_sigma = x0 + level * eps
    alpha = (1 + level**2).rsqrt()
    outputs = {
        "eps": eps,
        "v": alpha * eps - alpha * level * x0,
        "x0": x0,
        "flow": eps - x0,
        "edm": (x0 - SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2) * x_sigma)
        / (level * SIGMA_DATA / (level**2 + SIGMA_DATA**2).sqrt()),
    }
    for name, output in outputs.items():
        assert torch.allclose(to_x0(output, x_sigma, level, name, SIGMA_DATA), x0, atol=2e-4), name


def test_loss_weights_equal_the_forms_own_losses(noised):
    x0, eps = noised
    wide = LEVELS.reshape(-1, 1, 1, 1)
    x_sigma, wrong = x0 + wide * eps, torch.randn_like(eps)
    total = wide**2 + SIGMA_DATA**2
    edm = (x0 - SIGMA_DATA**2 / total * x_sigma) / (
        wide * SIGMA_DATA / total.sqrt()
    )  # what EDM's network says
    for kind, name, target in [("vp", "eps", eps), ("flow", "flow", eps - x0), ("edm", "edm", edm)]:
        table = diffusers.DDPMScheduler().alphas_cumprod if kind == "vp" else None
        weight = NoiseSchedule(kind, alphas_cumprod=table, sigma_data=SIGMA_DATA).loss_weight(LEVELS)
        in_x0 = weight * (to_x0(wrong, x_sigma, wide, name, SIGMA_DATA) - x0).square().flatten(1).mean(1)
        assert torch.allclose(in_x0, (wrong - target).square().flatten(1).mean(1), rtol=2e-2)


@pytest.mark.parametrize("kind", ["edm", "flow", "vp"])
def test_the_grid_rises_and_the_start_is_pure_noise(kind):
    table = diffusers.DDPMScheduler().alphas_cumprod if kind == "vp" else None
    schedule = NoiseSchedule(kind, alphas_cumprod=table)
    sigmas = schedule.sigma_at(torch.linspace(0, 1, 50))
    assert (sigmas.diff() > 0).all()
    if kind == "edm":
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        assert sigmas[7] == pytest.approx((low + (high - low) / 7) ** 7, rel=1e-4)
    assert sigmas[0] == pytest.approx(schedule.sigma_min, rel=1e-3)
    assert sigmas[-1] == pytest.approx(schedule.sigma_max, rel=2e-2)
    top = torch.tensor([schedule.sigma_max])
    start = schedule.start_scale(schedule.sigma_max) * schedule.scale(top)
    assert start.item() == pytest.approx(1.0, rel=1e-3)  # unit variance into the network, whatever the form

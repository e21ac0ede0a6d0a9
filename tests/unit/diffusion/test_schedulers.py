"""Samplers of foreign schedulers against diffusers' own loops, at the same noise, with a fixed nonlinear network."""

from __future__ import annotations

import math
import sys

import diffusers
import numpy as np
import pytest
import torch

from distill_core.diffusion.schedulers import path
from distill_core.diffusion.steps import INFINITE, follow
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.diffusers_schedule import schedule_of
from distill_core.networks.foreign.samplers import scheduler_spec

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SPACINGS = ("linspace", "leading", "trailing")
BOTH = ("epsilon", "v_prediction")
COUNTS = (1, 2, 3, 4, 7, 15, 30, 50)
MIX = np.random.default_rng(0).normal(size=(6, 6)) / 2
CLIP = 1.3
MU = 0.5 + (1.15 - 0.5) / (4096 - 256) * (
    6 * 10 - 256
)  # of 60 tokens, a third as many as the least that is meant

Case = tuple[
    type, dict[str, object], tuple[str, ...], dict[str, object]
]  # class, config, predictions, step's arguments


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for spacing in SPACINGS:
        at: dict[str, object] = {
            **SD,
            "timestep_spacing": spacing,
            "steps_offset": 1 if spacing == "leading" else 0,
        }
        quiet = {**at, "clip_sample": False}
        found |= {
            f"euler, {spacing}": (diffusers.EulerDiscreteScheduler, at, BOTH, {}),
            f"euler karras, {spacing}": (
                diffusers.EulerDiscreteScheduler,
                {**at, "use_karras_sigmas": True},
                BOTH,
                {},
            ),
            f"euler ancestral, {spacing}": (diffusers.EulerAncestralDiscreteScheduler, at, BOTH, {}),
            f"heun, {spacing}": (diffusers.HeunDiscreteScheduler, at, BOTH, {}),
            f"ddim, {spacing}": (diffusers.DDIMScheduler, {**quiet, "set_alpha_to_one": False}, BOTH, {}),
            f"ddim eta, {spacing}": (diffusers.DDIMScheduler, quiet, BOTH, {"eta": 0.7}),
            f"ddim clip, {spacing}": (diffusers.DDIMScheduler, {**at, "clip_sample_range": CLIP}, BOTH, {}),
            f"dpm, {spacing}": (diffusers.DPMSolverMultistepScheduler, at, BOTH, {}),
            f"unipc, {spacing}": (diffusers.UniPCMultistepScheduler, at, BOTH, {}),
        }
    euler, dpm, unipc = (
        diffusers.EulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
    )
    sde, ends, flow = (
        {"algorithm_type": "sde-dpmsolver++"},
        {"final_sigmas_type": "sigma_min"},
        ("flow_prediction",),
    )
    found |= {
        "euler exponential": (euler, {**SD, "use_exponential_sigmas": True}, BOTH, {}),
        "euler to the first timestep": (euler, {**SD, **ends}, BOTH, {}),
        "euler of its own ends": (
            euler,
            {**SD, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
            BOTH,
            {},
        ),
        "heun karras clip": (
            diffusers.HeunDiscreteScheduler,
            {
                **SD,
                "use_karras_sigmas": True,
                "clip_sample": True,
                "clip_sample_range": CLIP,
                "timestep_spacing": "trailing",
            },
            BOTH,
            {},
        ),
        "dpm karras": (dpm, {**SD, "use_karras_sigmas": True}, BOTH, {}),
        "dpm exponential": (dpm, {**SD, "use_exponential_sigmas": True}, BOTH, {}),
        "dpm of linear betas": (dpm, {}, BOTH, {}),
        "dpm euler_at_final": (dpm, {**SD, **ends, "euler_at_final": True}, BOTH, {}),
        "dpm to the first timestep": (dpm, {**SD, **ends, "lower_order_final": False}, BOTH, {}),
        "dpm sde": (dpm, {**SD, **sde}, BOTH, {}),
        "dpm sde heun": (dpm, {**SD, **sde, "solver_type": "heun", "timestep_spacing": "trailing"}, BOTH, {}),
        "unipc exponential": (unipc, {**SD, "use_exponential_sigmas": True}, BOTH, {}),
        "unipc karras": (unipc, {**SD, "use_karras_sigmas": True}, BOTH, {}),
        "lcm": (diffusers.LCMScheduler, {}, BOTH, {}),
        "lcm clip": (
            diffusers.LCMScheduler,
            {"clip_sample": True, "clip_sample_range": CLIP, "original_inference_steps": 100},
            BOTH,
            {},
        ),
        "zero SNR ddim": (
            diffusers.DDIMScheduler,
            {**ZERO, "clip_sample": False},
            ("v_prediction",),
            {"eta": 0.4},
        ),
        "zero SNR euler": (euler, ZERO, ("v_prediction",), {}),
        "zero SNR euler karras": (euler, {**ZERO, "use_karras_sigmas": True}, ("v_prediction",), {}),
        "zero SNR dpm": (dpm, ZERO, ("v_prediction",), {}),
        "zero SNR lcm": (diffusers.LCMScheduler, ZERO, ("v_prediction",), {}),
        "zero SNR tcd": (diffusers.TCDScheduler, ZERO, ("v_prediction",), {"eta": 0.3}),
    }
    found |= {f"tcd {eta}": (diffusers.TCDScheduler, {}, BOTH, {"eta": eta}) for eta in (0.0, 0.3, 1.0)}
    for shift in (1.0, 3.0):
        flows = {"use_flow_sigmas": True, "flow_shift": shift}
        matched = diffusers.FlowMatchEulerDiscreteScheduler
        found |= {
            f"dpm flow {shift}": (dpm, flows, flow, {}),
            f"unipc flow {shift}": (unipc, flows, flow, {}),
            f"flow {shift}": (matched, {"shift": shift}, ("",), {}),
            f"flow karras {shift}": (matched, {"shift": shift, "use_karras_sigmas": True}, ("",), {}),
            f"flow stochastic {shift}": (matched, {"shift": shift, "stochastic_sampling": True}, ("",), {}),
        }
    return found


CASES = cases()


def network(x, time):
    """A fixed nonlinear function of a sample in its own form, and of a time from 0 to 1000."""
    turned = torch.sin(torch.tensor(float(time)) / 100)
    return torch.tanh(x @ torch.tensor(MIX) + turned) + 0.3 * x * math.cos(float(time) / 70)


def noises(count: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    return [torch.randn(40, 6, generator=random, dtype=torch.float64) for _ in range(count + 2)]


def theirs(scheduler, count, z, monkeypatch, step=None, **levels):
    """Diffusers' loop; its draws are `z[1:]` in turn."""
    drawn = iter(z[1:])
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: next(drawn))
    scheduler.set_timesteps(**({"num_inference_steps": count} | levels))
    x = z[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, time), time, x, return_dict=False, **(step or {}))[0].double()
    return x


def denoiser(scheduler, prediction, *, timed):
    schedule = schedule_of(scheduler)

    def denoise(x, sigma, time):
        if not timed:
            time = float(schedule.network_time(torch.tensor([sigma]))[0])
        scale = 1 / math.sqrt(1 + sigma**2) if schedule.kind == "vp" else 1 / (1 + sigma)
        output = network(x * scale, time)
        if schedule.kind == "flow":
            return (x - sigma * output) * scale
        if prediction == "v_prediction":
            return scale**2 * x - scale * sigma * output
        return x - sigma * output

    return denoise


def ours(scheduler, count, z, prediction, *, size=(6, 10), timed=None, **changes):
    spec = scheduler_spec(scheduler).model_copy(update=changes)
    clip = scheduler.config.get("clip_sample") and scheduler.config.clip_sample_range
    steps = path(spec, count, size)
    denoise = denoiser(scheduler, prediction, timed=spec.timed if timed is None else timed)
    clamp = (lambda x0: x0.clip(-clip, clip)) if clip else None
    return follow(denoise, z[0] * steps.start, steps.steps, lambda k: z[k], clamp)


def off(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("name", "prediction"), [(name, each) for name in CASES for each in CASES[name][2]])
def test_a_sampler_ends_where_diffusers_does(name, prediction, monkeypatch):
    cls, config, _, step = CASES[name]
    config = {**config, "prediction_type": prediction} if prediction else config
    changes = {"eta": step["eta"]} if step else {}
    for count in COUNTS:
        z, scheduler = noises(count), cls(**config)
        wanted = theirs(scheduler, count, z, monkeypatch, step)
        assert off(ours(scheduler, count, z, prediction, **changes), wanted) < 1e-4, f"{count} steps"
        told = ours(scheduler, count, z, prediction, timed=True, **changes)  # with the scheduler's own times
        assert off(told, wanted) < 1e-4, f"{count} steps"


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_follows_the_size_of_what_is_drawn(kind, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    for count in (2, 5, 28):
        z = noises(count)
        wanted = theirs(scheduler, count, z, monkeypatch, mu=MU)
        assert off(ours(scheduler, count, z, ""), wanted) < 1e-4
        assert off(ours(scheduler, count, z, "", size=(60, 100)), wanted) > 3e-4
        even = theirs(scheduler, count, z, monkeypatch, mu=MU, sigmas=np.linspace(1, 1 / count, count))
        assert off(ours(scheduler, count, z, "", even_levels=True, size=(12, 20), patch=2), even) < 1e-4


def test_levels_are_stretched_to_a_last_one_that_is_fixed(monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02)
    for count in (2, 5, 28):
        z = noises(count)
        assert off(ours(scheduler, count, z, ""), theirs(scheduler, count, z, monkeypatch)) < 1e-4
    with pytest.raises(ConfigError, match="num_steps = 1 is not allowed"):
        path(scheduler_spec(scheduler), 1, (6, 10))


@pytest.mark.parametrize("named", [(999, 749, 499, 249), (800,), (399,)])
def test_named_timesteps_take_the_place_of_the_grid(named, monkeypatch):
    scheduler, z = diffusers.LCMScheduler(), noises(4)
    wanted = theirs(scheduler, None, z, monkeypatch, timesteps=list(named))
    assert off(ours(scheduler, len(named), z, "epsilon", timesteps=named), wanted) < 1e-4


def test_scm_is_the_sampler_of_few_steps_under_flow_matching(monkeypatch):
    """Its angle s has the flow time sin s / (sin s + cos s), and its samples have half our standard deviation."""
    module = sys.modules[diffusers.SCMScheduler.__module__]
    for count in (1, 2, 4):
        z, scheduler = noises(count), diffusers.SCMScheduler()
        drawn = iter(z[1:])
        monkeypatch.setattr(module, "randn_tensor", lambda shape, drawn=drawn, **options: next(drawn))
        scheduler.set_timesteps(count, intermediate_timesteps=1.3 if count == 2 else None)
        x = z[0] / 2
        for angle in scheduler.timesteps[:-1].double():
            sine, cosine = torch.sin(angle), torch.cos(angle)
            t = sine / (sine + cosine)
            x_t = x * 2 * (t**2 + (1 - t) ** 2).sqrt()
            x0 = x_t - t * network(x_t, 1000 * t)
            output = (cosine * x - x0 / 2) / sine
            x = scheduler.step(output, angle, x, return_dict=False)[0].double()
        assert off(ours(scheduler, count, z, ""), 2 * x) < 1e-4


def test_times_that_were_rounded_are_told_to_the_network(monkeypatch):
    """From the level alone the time would be another: by half a step of the training grid."""
    scheduler, z = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True), noises(20)
    wanted = theirs(scheduler, 20, z, monkeypatch)
    assert scheduler_spec(scheduler).timed
    assert off(ours(scheduler, 20, z, "epsilon", timed=False), wanted) > 1e-4
    assert not scheduler_spec(diffusers.DPMSolverMultistepScheduler(**SD)).timed


def test_a_network_of_float32_keeps_its_digits_from_flow_time_one(monkeypatch):
    scheduler, z = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), noises(4)
    wanted = theirs(scheduler, 4, z, monkeypatch)
    steps = path(scheduler_spec(scheduler), 4, (6, 10))
    assert steps.steps[0].sigma == INFINITE
    exact = denoiser(scheduler, "", timed=True)

    def denoise(x, sigma, time):
        assert x.dtype == torch.float32
        return exact(x.double(), sigma, time).float()

    found = follow(denoise, (z[0] * steps.start).float(), steps.steps, lambda k: z[k].float())
    assert off(found.double(), wanted) < 1e-5


def test_numbers_of_steps_without_levels_are_refused():
    spec = scheduler_spec(diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"))
    with pytest.raises(ConfigError, match="num_steps = 61 is not allowed.*trailing") as error:
        path(spec, 61, (6, 10))
    assert error.value.field == "num_steps"
    with pytest.raises(ConfigError, match="num_steps = 51 is not allowed for this model: 1 to 50"):
        path(scheduler_spec(diffusers.LCMScheduler()), 51, (6, 10))


def test_keys_that_exclude_each_other_are_refused_in_a_sentence():
    scheduler = diffusers.UniPCMultistepScheduler(final_sigmas_type="sigma_min", prediction_type="epsilon")
    with pytest.raises(ArtifactError, match="UniPCMultistepScheduler makes no sampler.*final_sigmas_type"):
        scheduler_spec(scheduler)


def test_a_class_without_a_sampler_has_none():
    assert scheduler_spec(diffusers.DDPMScheduler()) is None
    assert scheduler_spec(diffusers.EDMEulerScheduler()) is None

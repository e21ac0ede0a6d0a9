"""A network is read through every scheduler of diffusers as that scheduler reads it, or refused by the key's name."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill_core.errors import ArtifactError
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.foreign.schedulers import SCHEDULERS
from distill_core.networks.generation import generate_x0
from tests.helpers import TINY_UNET, edited, tiny_pixels

TRAINED = [0.001 + 0.0004 * index for index in range(40)]
BETAS = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "trained": {"trained_betas": TRAINED, "num_train_timesteps": 40},
    "fewer": {"num_train_timesteps": 300, "beta_end": 0.07},
}


def theirs(folder, latent, timestep, cls=diffusers.DDIMScheduler):
    """x0 of `latent`, in the scheduler's own form, by diffusers' own step."""
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    scheduler = cls.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    with torch.no_grad():
        output = network(latent, timestep).sample
    return scheduler, scheduler.step(output, timestep, latent)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", sorted(BETAS))
def test_betas_and_predictions_are_read_as_ddim_reads_them(betas, prediction, tmp_path):
    args = {**BETAS[betas], "prediction_type": prediction, "clip_sample": False}
    folder = tiny_pixels(tmp_path, diffusers.DDIMScheduler(**args))
    denoiser, latent = load_denoiser(folder), torch.randn(2, 3, 8, 8)
    for part in (0.2, 0.6):
        timestep = int(part * args.get("num_train_timesteps", 1000))
        scheduler, step = theirs(folder, latent, timestep)
        alpha = scheduler.alphas_cumprod[timestep].sqrt()
        sigma = ((1 - alpha**2).sqrt() / alpha).expand(2)
        with torch.no_grad():
            found = denoiser(latent / alpha, sigma)
        torch.testing.assert_close(found, step.pred_original_sample, atol=2e-5, rtol=2e-5)


def karras_like(cls, **args):
    """A scheduler that keeps samples in the variance-exploding form, ready to step."""
    scheduler = cls(**args)
    scheduler.set_timesteps(7)
    return scheduler


VARIANCE_EXPLODING = {
    "euler v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
    "euler x0": (diffusers.EulerDiscreteScheduler, {"prediction_type": "sample"}),
    "euler zero snr": (
        diffusers.EulerDiscreteScheduler,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "euler continuous": (
        diffusers.EulerDiscreteScheduler,
        {
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
            "sigma_min": 0.02,
            "sigma_max": 70.0,
        },
    ),
    "euler continuous eps": (diffusers.EulerDiscreteScheduler, {"timestep_type": "continuous"}),
    "edm": (diffusers.EDMEulerScheduler, {"sigma_data": 0.7, "sigma_max": 60.0}),
    "edm v": (diffusers.EDMEulerScheduler, {"sigma_data": 1.0, "prediction_type": "v_prediction"}),
}


@pytest.mark.parametrize("kind", sorted(VARIANCE_EXPLODING))
def test_schedules_in_the_variance_exploding_form_are_read_as_their_own_step_reads_them(kind, tmp_path):
    cls, args = VARIANCE_EXPLODING[kind]
    folder = tiny_pixels(tmp_path, cls(**args))
    denoiser = load_denoiser(folder)
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    for index in (0, 2, 5):
        scheduler = karras_like(cls, **args)
        scheduler.set_begin_index(index)
        timestep, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
        x_sigma = torch.randn(2, 3, 8, 8) * (1 + sigma)
        with torch.no_grad():
            output = network(scheduler.scale_model_input(x_sigma, timestep), timestep).sample
            step = scheduler.step(output, timestep, x_sigma)
            found = denoiser(x_sigma, sigma.expand(2))
        scale = float(step.pred_original_sample.abs().max())
        torch.testing.assert_close(found / scale, step.pred_original_sample / scale, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_a_schedule_without_signal_at_its_end_is_read_alike_after_it_was_saved(cls, tmp_path):
    scheduler = cls(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    denoiser = load_denoiser(tiny_pixels(tmp_path / "first", scheduler))
    denoiser.save(tmp_path / "again")
    again = load_denoiser(tmp_path / "again")
    x, sigma = torch.randn(4, 3, 8, 8), torch.tensor([0.3, 7.0, 70.0, 900.0])
    x = x * sigma.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(again(x, sigma), denoiser(x, sigma), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cls", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
def test_solvers_with_flow_levels_are_read_as_flows(cls, tmp_path):
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    folder = tiny_pixels(tmp_path, scheduler)
    denoiser = load_denoiser(folder)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    scheduler._step_index = 2
    t, x_t = scheduler.sigmas[2], torch.randn(2, 3, 8, 8)
    assert abs(scheduler.timesteps[2] - 1000 * t) < 1  # diffusers cuts times to whole numbers
    with torch.no_grad():
        output = diffusers.UNet2DModel.from_pretrained(folder / "unet")(x_t, 1000 * t).sample
        expected = scheduler.convert_model_output(output, sample=x_t)
        found = denoiser(x_t / (1 - t), (t / (1 - t)).expand(2))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert denoiser.parameterisation == "flow"


def test_a_flow_of_another_number_of_timesteps_is_told_its_own_times(tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=70, shift=3.0)
    folder = tiny_pixels(tmp_path, scheduler)
    denoiser = load_denoiser(folder)
    scheduler.set_timesteps(5)
    t, timestep, x_t = scheduler.sigmas[1], scheduler.timesteps[1], torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        output = diffusers.UNet2DModel.from_pretrained(folder / "unet")(x_t, timestep.expand(2)).sample
        found = denoiser(x_t / (1 - t), (t / (1 - t)).expand(2))
    torch.testing.assert_close(found, x_t - t * output, atol=2e-5, rtol=2e-5)


def test_a_learned_variance_is_no_part_of_x0(tmp_path):
    args = {"variance_type": "learned_range", "clip_sample": False}
    folder = tiny_pixels(tmp_path, diffusers.DDPMScheduler(**args), out_channels=6)
    latent = torch.randn(2, 3, 8, 8)
    scheduler, step = theirs(folder, latent, 400, diffusers.DDPMScheduler)
    alpha = scheduler.alphas_cumprod[400].sqrt()
    with torch.no_grad():
        found = load_denoiser(folder)(latent / alpha, ((1 - alpha**2).sqrt() / alpha).expand(2))
    torch.testing.assert_close(found, step.pred_original_sample, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("limit", "args"), [(1.0, {}), (0.3, {"clip_sample_range": 0.3}), (None, {"clip_sample": False})]
)
def test_a_scheduler_that_clamps_x0_gives_a_sampler_that_does(limit, args, tmp_path):
    denoiser = load_denoiser(tiny_pixels(tmp_path, diffusers.DDPMScheduler(**args)))
    assert denoiser.sampler.clip == limit
    drawn = generate_x0(denoiser, {}, range(3), seed=4, num_steps=2)
    assert float(drawn.abs().max()) > 1.1 if limit is None else float(drawn.abs().max()) < limit + 1e-4


def test_the_pipelines_index_decides_which_scheduler_reads_a_config(tmp_path):
    folder = tmp_path / "pipeline"
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**TINY_UNET)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)
    edited(folder, ".", "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edited(folder, "scheduler", "scheduler_config.json", rescale_betas_zero_snr=True)
    denoiser = load_denoiser(folder)
    assert isinstance(denoiser.scheduler, diffusers.EulerDiscreteScheduler)
    assert denoiser.sampler.clip is None


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_that_is_known_loads_as_diffusers_saves_it(name, tmp_path):
    load_denoiser(tiny_pixels(tmp_path, getattr(diffusers, name)()))


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        ("DDIMScheduler", {"thresholding": True}),
        ("DDPMScheduler", {"prediction_type": "flow_prediction"}),
        ("DDPMScheduler", {"prediction_type": "velocity"}),
        ("DDPMScheduler", {"timestep_type": "continuous"}),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"prediction_type": "sample"}),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
        ("EDMDPMSolverMultistepScheduler", {"thresholding": True}),
        ("LCMScheduler", {"timestep_scaling": 0.5}),
        ("EulerDiscreteScheduler", {"snr_shift_scale": 3.0}),
        ("EulerDiscreteScheduler", {"a_key_of_tomorrow": "on"}),
    ],
)
def test_what_a_schedule_says_and_nobody_would_do_is_refused_by_its_name(cls, changes, tmp_path):
    folder = tiny_pixels(tmp_path, getattr(diffusers, cls)())
    edited(folder, "scheduler", "scheduler_config.json", **changes)
    (key,) = changes
    with pytest.raises(ArtifactError, match=rf"scheduler_config\.json .*{key} = .*not understood"):
        load_denoiser(folder)


@pytest.mark.parametrize(
    ("cls", "changes", "sentence"),
    [
        ("DDIMScheduler", {"beta_schedule": "wavy"}, "wavy"),
        ("DDIMScheduler", {"beta_end": 1.5}, "no noise schedule"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "no noise schedule"),
        ("RePaintScheduler", {}, "holds a RePaintScheduler"),
        ("CogVideoXDDIMScheduler", {}, "holds a CogVideoXDDIMScheduler"),
    ],
)
def test_what_is_no_schedule_is_refused_in_a_sentence(cls, changes, sentence, tmp_path):
    folder = tiny_pixels(tmp_path, getattr(diffusers, cls)())
    edited(folder, "scheduler", "scheduler_config.json", **changes)
    with pytest.raises(ArtifactError, match=sentence):
        load_denoiser(folder)

"""A foreign folder draws what its own diffusers pipeline draws, under each scheduler that becomes a sampler."""

from __future__ import annotations

import pytest
import torch

from distill_core.errors import ArtifactError
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.generation import generate
from tests.foreign_samplers import PROMPTS, SD, SEED, drawn_by_diffusers, psnr, tiny_pipeline, under
from tests.helpers import edited

TRAILING = {**SD, "timestep_spacing": "trailing"}
SCHEDULERS = {
    "DDIM": ("DDIM", SD, {}),
    "DDIM trailing": ("DDIM", {**TRAILING, "set_alpha_to_one": False}, {}),
    "Euler": ("EulerDiscrete", {**SD, "timestep_spacing": "leading", "steps_offset": 1}, {}),
    "Euler trailing": ("EulerDiscrete", TRAILING, {}),
    "Euler Karras": ("EulerDiscrete", {**SD, "use_karras_sigmas": True}, {}),
    "Euler ancestral": ("EulerAncestralDiscrete", TRAILING, {}),
    "Heun": ("HeunDiscrete", {**TRAILING, "use_karras_sigmas": True}, {}),
    "DPM++ 2M": ("DPMSolverMultistep", SD, {}),
    "DPM++ 2M Karras": ("DPMSolverMultistep", {**SD, "use_karras_sigmas": True}, {}),
    "DPM++ 2M SDE": ("DPMSolverMultistep", {**SD, "algorithm_type": "sde-dpmsolver++"}, {}),
    "UniPC": ("UniPCMultistep", {**SD, "timestep_spacing": "leading"}, {}),
    "LCM": ("LCM", SD, {}),
    "TCD": ("TCD", SD, {"eta": 0.3}),  # the scheduler's own; the pipeline's is 0
}
ZERO = {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
WITHOUT_SIGNAL = {
    "DDIM": 90,
    "DPMSolverMultistep": 90,
    "EulerDiscrete": 80,
}  # dB; the last begins at level 4096,
# and diffusers' step takes numbers of that size from each other in float32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def folder(root):
    return tiny_pipeline(root / "eps")


@pytest.fixture(scope="module")
def v_folder(root):
    return tiny_pipeline(root / "v", prediction="v_prediction")


def drawn(folder, count, guidance):
    denoiser = load_denoiser(folder)
    cond = denoiser.encode_prompts(PROMPTS)
    made = generate(denoiser, cond, 2, seed=SEED, num_steps=count, guidance=guidance)
    return (made.numpy() + 1) / 2


def compared(folder, monkeypatch, options, least=90):
    for count, guidance in ((1, 1.0), (4, 5.0), (7, 3.0)):
        ours = drawn(folder, count, guidance)
        wanted = drawn_by_diffusers(folder, count, guidance, monkeypatch, **options)
        assert psnr(wanted[::-1], wanted) < 40, "pictures that are alike would hide every mistake"
        assert psnr(ours, wanted) >= least, f"{count} steps"


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_foreign_folder_draws_what_its_pipeline_draws(name, folder, monkeypatch):
    scheduler, config, options = SCHEDULERS[name]
    compared(under(folder, scheduler, **config), monkeypatch, options)


@pytest.mark.parametrize("name", sorted(WITHOUT_SIGNAL))
def test_a_schedule_that_ends_without_signal_is_drawn_too(name, v_folder, monkeypatch):
    compared(under(v_folder, name, **ZERO), monkeypatch, {}, WITHOUT_SIGNAL[name])


def test_a_latent_consistency_model_is_told_its_guidance_as_a_number(root, monkeypatch):
    folder = under(tiny_pipeline(root / "lcm", time_cond_proj_dim=12), "LCM", **SD)
    denoiser = load_denoiser(folder)
    assert (denoiser.sampler.num_steps, denoiser.sampler.guidance) == (4, 1.0)
    cond = denoiser.encode_prompts(PROMPTS)
    pictures = {}
    for scale, told in ((8.5, {}), (3.7, {"embedded_guidance": torch.full((2,), 3.7)})):
        made = generate(denoiser, {**cond, **told}, 2, seed=SEED)
        pictures[scale] = drawn_by_diffusers(folder, 4, scale, monkeypatch)
        assert psnr((made.numpy() + 1) / 2, pictures[scale]) >= 90
    assert psnr(pictures[3.7], pictures[8.5]) < 60


def test_fresh_noise_of_a_step_is_an_images_own(folder):
    denoiser = load_denoiser(under(folder, "EulerAncestralDiscrete", **TRAILING))
    cond = denoiser.encode_prompts(PROMPTS)
    together = generate(denoiser, cond, 2, seed=SEED, num_steps=4)
    apart = generate(denoiser, cond, 2, seed=SEED, num_steps=4, batch_size=1)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "config", "num_steps", "known_as"),
    [
        ("LCM", SD, 4, "a student of LCM"),
        ("TCD", SD, 4, "a student of TCD"),
        ("EulerAncestralDiscrete", TRAILING, 4, "SDXL-Turbo"),
        ("EulerDiscrete", TRAILING, 4, "SD-Turbo"),
        ("EulerDiscrete", {**SD, "timestep_spacing": "leading"}, 30, ""),
        ("DDIM", TRAILING, 30, ""),
    ],
)
def test_a_few_step_student_is_known_by_its_scheduler(
    scheduler, config, num_steps, known_as, folder, tmp_path
):
    denoiser = load_denoiser(under(folder, scheduler, **config))
    spec = denoiser.sampler
    assert (spec.num_steps, spec.guidance) == ((num_steps, 1.0) if known_as else (num_steps, 7.5))
    assert known_as in spec.assumed
    denoiser.save(tmp_path / "again")
    assert load_denoiser(tmp_path / "again").sampler == spec
    assert spec.assumed in (tmp_path / "again" / "README.md").read_text()


def test_a_scheduler_without_a_sampler_is_sampled_as_before_and_said(folder):
    spec = load_denoiser(under(folder, "PNDM", **SD, skip_prk_steps=True)).sampler
    assert (spec.kind, spec.num_steps) == ("euler", 30)
    assert spec.assumed.startswith("PNDMScheduler has no sampler here")


@pytest.mark.parametrize(
    ("scheduler", "key", "value"),
    [
        ("EulerDiscrete", "interpolation_type", "log_linear"),
        ("EulerDiscrete", "use_beta_sigmas", True),
        ("DPMSolverMultistep", "solver_order", 3),
        ("DPMSolverMultistep", "use_lu_lambdas", True),
        ("DPMSolverMultistep", "lambda_min_clipped", -5.1),
        ("UniPCMultistep", "solver_type", "bh1"),
        ("UniPCMultistep", "disable_corrector", [0]),
    ],
)
def test_a_key_that_would_take_other_steps_is_refused_by_name(scheduler, key, value, folder):
    under(folder, scheduler, **SD)
    edited(folder, "scheduler", "scheduler_config.json", **{key: value})
    with pytest.raises(
        ArtifactError, match=rf"scheduler_config.json says {key} = .*, which is not understood"
    ):
        load_denoiser(folder)

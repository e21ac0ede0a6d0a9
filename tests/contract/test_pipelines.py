"""Our picture is the pipeline's own: same folder, latents, steps, guidance, prompt and negative prompt."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill_core.networks.diffusers_io import load_denoiser
from tests.pipeline_pictures import NEGATIVE, OTHER, PROMPT, latents_of, ours, psnr, theirs
from tests.tiny_pipelines import (
    tiny_flux,
    tiny_flux2,
    tiny_pixart,
    tiny_qwen_image,
    tiny_sana,
    tiny_sd3,
    tiny_z_image,
)

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
CASES = {
    "sd3": (tiny_sd3, {}),
    "sd3-dynamic": (tiny_sd3, {"scheduler": FLOW(**DYNAMIC)}),
    "sd3-without-t5": (tiny_sd3, {"t5": False}),
    "sd35": (tiny_sd3, {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "flux-dev": (tiny_flux, {}),
    "flux-schnell": (tiny_flux, {"dev": False}),
    "flux-tiny-codec": (tiny_flux, {"tiny_codec": True}),
    "pixart-sigma": (tiny_pixart, {}),
    "pixart-alpha": (tiny_pixart, {"alpha": True}),
    "pixart-alpha-sized": (tiny_pixart, {"alpha": True, "sized": True}),
    "pixart-euler": (tiny_pixart, {"scheduler": diffusers.EulerDiscreteScheduler(beta_schedule="linear")}),
    "qwen-image": (tiny_qwen_image, {}),
    "z-image": (tiny_z_image, {}),
    "flux2": (tiny_flux2, {}),
    "sana": (tiny_sana, {}),
    "sana-euler": (tiny_sana, {"scheduler": FLOW(shift=3.0)}),
    "sana-shift": (
        tiny_sana,
        {"scheduler": diffusers.DPMSolverMultistepScheduler(**FLOW_DPM, flow_shift=1.7)},
    ),
}
RUNS = [(4, 5.0, NEGATIVE), (7, 3.0, ""), (3, 1.0, "")]  # steps, guidance, negative prompt


@pytest.fixture(scope="module", params=sorted(CASES))
def opened(request, tmp_path_factory):
    torch.set_num_threads(1)
    build, options = CASES[request.param]
    folder = build(tmp_path_factory.mktemp("pipelines") / request.param, **options)
    lacking = {} if options.get("t5", True) else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **lacking)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = load_denoiser(folder)
    factor = denoiser.image.picture[1] // denoiser.image.height
    height, width = (4, 8) if factor == 8 else (8, 12)  # higher than wide, and no square
    denoiser.image = denoiser.image.model_copy(
        update={"height": height, "width": width, "picture": (3, height * factor, width * factor)}
    )
    return pipeline, denoiser


@pytest.mark.parametrize(("steps", "guidance", "negative"), RUNS)
def test_a_picture_is_the_pipelines_own(opened, steps, guidance, negative):
    pipeline, denoiser = opened
    negative = "" if isinstance(pipeline, diffusers.Flux2KleinPipeline) else negative
    latents = latents_of(denoiser)
    made = ours(denoiser, latents, steps, guidance, negative)
    wanted = theirs(pipeline, denoiser, latents, steps, guidance, negative)
    other = ours(denoiser, latents, steps, guidance, negative, OTHER)
    assert psnr(made, wanted) >= 90
    assert psnr(other, made) < 50


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_few_step_picture_of_sprint_is_the_pipelines_own(steps, tmp_path):
    torch.set_num_threads(1)
    folder = tiny_sana(tmp_path / "sprint", sprint=True)
    pipeline, denoiser = diffusers.DiffusionPipeline.from_pretrained(folder), load_denoiser(folder)
    latents, drawn = latents_of(denoiser), torch.Generator().manual_seed(9)
    more = {"generator": torch.Generator().manual_seed(9)} | (
        {} if steps == 2 else {"intermediate_timesteps": None}
    )
    shared = {
        "num_inference_steps": steps,
        "height": 32,
        "width": 32,
        "output_type": "pt",
        **denoiser.family.options,
    }
    wanted = pipeline([PROMPT] * 2, latents=latents, guidance_scale=2.5, **shared, **more).images

    def draw(k):
        return torch.randn(latents.shape, generator=drawn) if k else latents

    told = {"embedded_guidance": torch.full((2,), 2.5)}
    made = ours(denoiser, latents, steps, 1.0, draw=draw, **told)
    assert psnr(made, wanted) >= 90
    assert psnr(ours(denoiser, latents, steps, 1.0), made) < 50  # the usual guidance and other noise

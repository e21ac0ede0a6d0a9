"""Text-to-image networks as graphs: what the sampler serves of them is the picture of diffusers' own pipeline."""

from __future__ import annotations

import json

import onnxruntime
import pytest
import torch

from distill_core.networks.diffusers_io import load_denoiser
from distillery_converter.convert import convert
from tests.pipeline_pictures import OTHER, latents_of, ours, psnr, theirs
from tests.pipeline_rows import GUIDANCE, STEPS, negative_of, opened, published, request
from tests.services.sampler.helpers import answer
from tests.tiny_pipelines import BUILDERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


def test_a_picture_of_the_graphs_is_the_pipelines_own(tmp_path):
    """SDXL's, with two encoders and pooled prompts; `python -m tools pipelines` measures every class."""
    torch.set_num_threads(1)
    folder = BUILDERS["sdxl"](tmp_path / "sdxl")
    pipeline, denoiser = opened(folder), load_denoiser(folder)
    store, latents, negative = published(folder, tmp_path), latents_of(denoiser), negative_of(pipeline)
    exports = store.fetch(convert(store, "model", "onnx-fp32").ref) / "exports" / "onnx-fp32"
    inputs = {node.name for node in onnxruntime.InferenceSession(exports / "denoiser.onnx").get_inputs()}
    assert inputs == {"x_sigma", "sigma", "prompt_embeds", "pooled_embeds"}
    (served,) = answer(store, tmp_path / "cache", request(2, latents, negative))
    wanted = theirs(pipeline, denoiser, latents, STEPS, GUIDANCE, negative)
    other = ours(denoiser, latents, STEPS, GUIDANCE, negative, OTHER)
    assert psnr(torch.from_numpy(served) / 2 + 0.5, wanted) >= 60
    assert psnr(other, wanted) < 50, "pictures that are alike would hide every mistake"
    assert json.loads((exports / "prompts.json").read_text())["zero_null"] is True

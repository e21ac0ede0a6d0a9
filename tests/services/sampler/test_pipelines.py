"""A served picture is the one of its folder's own pipeline."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.diffusion.noise import unit_normals
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distillery_sampler.engine.requests import GenerateRequest
from tests.contract.test_pipelines import PROMPT, psnr, theirs
from tests.services.sampler.helpers import answer
from tests.tiny_pipelines import BUILDERS


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"sd", "sdxl"}))
def test_a_served_picture_is_the_pipelines_own(name, tmp_path):
    torch.set_num_threads(1)
    folder, store = BUILDERS[name](tmp_path / name), ArtifactStore(tmp_path / "store")
    denoiser = load_denoiser(folder)
    store.publish(folder, Manifest(name=name, **described(denoiser)))
    negative = "" if name == "flux2" else "a dog"  # whose pipeline takes none
    options = {"prompts": (PROMPT, "snow"), "negative_prompts": (negative,), "seed": 5, "num_steps": 3}
    (served,) = answer(store, tmp_path, GenerateRequest(name, guidance=4.0, **options))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    image = denoiser.image
    shape = image.channels, image.height, image.width
    latents = torch.from_numpy(unit_normals([(5, 0), (5, 1)], 0, shape))
    for index, prompt in enumerate((PROMPT, "snow")):
        wanted = theirs(pipeline, denoiser, latents[index : index + 1], 3, 4.0, negative, prompt)
        assert psnr(torch.from_numpy(served[index]) / 2 + 0.5, wanted[0]) >= 90

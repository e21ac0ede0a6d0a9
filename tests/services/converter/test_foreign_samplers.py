"""A foreign folder that is published without training: what the sampler draws of it, with torch and as graphs."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distillery_converter.convert import convert
from distillery_sampler.engine.requests import GenerateRequest
from tests.foreign_samplers import PROMPTS, SD, SEED, drawn_by_diffusers, psnr, tiny_pipeline, under
from tests.services.sampler.helpers import answer

TIMED = {"x_sigma", "sigma", "prompt_embeds", "time"}
SCHEDULERS = {  # class, config, and the inputs of its denoiser's graph
    "rounded-times": ("DPMSolverMultistep", {**SD, "use_karras_sigmas": True}, TIMED),
    "fresh-noise": ("EulerAncestralDiscrete", {**SD, "timestep_spacing": "trailing"}, TIMED - {"time"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_pipeline(tmp_path_factory.mktemp("foreign") / "pipeline")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_sampler_draws_what_the_folders_own_pipeline_draws(name, folder, tmp_path, monkeypatch):
    scheduler, config, inputs = SCHEDULERS[name]
    under(folder, scheduler, **config)
    store = ArtifactStore(tmp_path / "store")
    store.publish(folder, Manifest(name=name, **described(load_denoiser(folder))))
    graphs = store.fetch(convert(store, name, "onnx-fp32").ref) / "exports" / "onnx-fp32"
    session = onnxruntime.InferenceSession(graphs / "denoiser.onnx")
    assert {node.name for node in session.get_inputs()} == inputs

    wanted = drawn_by_diffusers(folder, 5, 4.0, monkeypatch)
    options = {"prompts": tuple(PROMPTS), "seed": SEED, "num_steps": 5, "guidance": 4.0}
    requests = [GenerateRequest(f"{name}@{version}", **options) for version in (1, 2)]
    by_torch, by_graphs = (((1 + made) / 2) for made in answer(store, tmp_path / "cache", *requests))
    assert psnr(by_torch, wanted) >= 90
    assert psnr(by_graphs, wanted) >= 60
    alone = GenerateRequest(f"{name}@2", **{**options, "prompts": (PROMPTS[0],)})
    (first,) = answer(store, tmp_path / "cache", alone)
    np.testing.assert_allclose((1 + first) / 2, by_graphs[:1], atol=1e-4)

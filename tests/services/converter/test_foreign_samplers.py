"""A foreign folder that is published without training: what the sampler draws of it, with torch and as graphs."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from distill_core.artifacts import ArtifactStore, ExportReport, Manifest
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distillery_converter.convert import convert
from distillery_sampler.engine.requests import GenerateRequest
from tests.foreign_samplers import PROMPTS, SD, SEED, drawn_by_diffusers, psnr, tiny_pipeline, under
from tests.services.sampler.helpers import answer
from tests.services.sampler.test_torch import export_text_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
OPTIONS = {"prompts": tuple(PROMPTS), "seed": SEED, "num_steps": 5, "guidance": 4.0}


@pytest.fixture
def folder(tmp_path):
    torch.set_num_threads(1)
    return tiny_pipeline(tmp_path / "pipeline")


def compared(store, name, folder, tmp_path, monkeypatch):
    """Pictures of version 1, by torch, and of version 2, by its graphs, against diffusers'; a picture alone, too."""
    wanted = drawn_by_diffusers(folder, 5, 4.0, monkeypatch)
    requests = [GenerateRequest(f"{name}@{version}", **OPTIONS) for version in (1, 2)]
    alone = GenerateRequest(f"{name}@2", **{**OPTIONS, "prompts": (PROMPTS[0],)})
    made = answer(store, tmp_path / "cache", *requests, alone)
    by_torch, by_graphs, first = ((1 + pictures) / 2 for pictures in made)
    assert psnr(wanted[::-1], wanted) < 40, "pictures that are alike would hide every mistake"
    assert psnr(by_torch, wanted) >= 90
    assert psnr(by_graphs, wanted) >= 60
    np.testing.assert_allclose(first, by_graphs[:1], atol=1e-4)


def test_times_of_levels_are_an_input_of_the_graph(folder, tmp_path, monkeypatch):
    under(folder, "DPMSolverMultistep", **SD, use_karras_sigmas=True)
    store = ArtifactStore(tmp_path / "store")
    store.publish(folder, Manifest(name="rounded", **described(load_denoiser(folder))))
    graphs = store.fetch(convert(store, "rounded", "onnx-fp32").ref) / "exports" / "onnx-fp32"
    inputs = {node.name for node in onnxruntime.InferenceSession(graphs / "denoiser.onnx").get_inputs()}
    assert inputs == {"x_sigma", "sigma", "prompt_embeds", "time"}
    compared(store, "rounded", folder, tmp_path, monkeypatch)


def test_a_graph_without_times_serves_a_scheduler_that_draws_fresh_noise(folder, tmp_path, monkeypatch):
    under(folder, "EulerAncestralDiscrete", **SD, timestep_spacing="trailing")
    store, denoiser = ArtifactStore(tmp_path / "store"), load_denoiser(folder)
    store.publish(folder, Manifest(name="fresh", **described(denoiser)))
    exported = tmp_path / "exported"
    export_text_model(denoiser, exported / "exports" / "onnx-fp32")
    shutil.copytree(folder / "tokenizer", exported / "tokenizer")
    denoiser.text.tokenizer.backend_tokenizer.save(str(exported / "tokenizer" / "tokenizer.json"))
    figures = {"max_abs_difference": 0, "rel_l2": 0, "tolerance": 1, "seconds": 0}
    report = ExportReport(target="onnx-fp32", files=(), batches=(2,), **figures)
    store.publish(exported, Manifest(name="fresh", **described(denoiser), exports={"onnx-fp32": report}))
    compared(store, "fresh", folder, tmp_path, monkeypatch)

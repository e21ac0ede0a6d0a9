"""Under autocast only the network works in bf16: what leads to it and away from it is float32."""

from __future__ import annotations

import pytest
import torch

from distill_core import api
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.recipe import load_recipe
from tests.helpers import tiny_text_to_image

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")


def test_x0_at_a_high_level_is_computed_in_float32_from_what_the_network_said(pipeline):
    denoiser, said = load_denoiser(pipeline), []
    denoiser.network.register_forward_hook(lambda _network, _args, output: said.append(output.sample))
    sigma = torch.full((2,), denoiser.schedule.sigma_max)
    x_sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigma[0]
    with torch.no_grad(), torch.autocast(**BF16):
        x0 = denoiser(x_sigma, sigma, denoiser.encode_prompts(["a cat", "a dog"]))
    assert said[0].dtype == torch.bfloat16
    exact = x_sigma.double() - float(sigma[0]) * said[0].double()
    assert x0.dtype == torch.float32
    assert (x0 - exact).abs().max() < 1e-5 * float(sigma[0])  # bf16 arithmetic would be off by 1e-3 and more


def test_latents_of_pictures_do_not_depend_on_autocast(pipeline):
    denoiser = load_denoiser(pipeline)
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = denoiser.encode(picture)
        with torch.autocast(**BF16):
            found = denoiser.encode(picture)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("dmd2", {"critic_steps": 1, "guidance": 3.0, "levels": [14.0, 2.0]}),
        ("swiftbrush", {"lora": {"rank": 2}, "condition_dropout": 0.5}),
    ],
)
def test_a_text_student_trains_in_bf16_and_keeps_its_weights_in_float32(method, config, pipeline, tmp_path):
    values = {
        "method": method,
        "steps": 2,
        "batch_size": 2,
        "threads": 1,
        "precision": "bf16",
        "teacher": {"path": str(pipeline)},
        "data": {"name": "prompts", "prompts": ["a cat", "a dog"]},
        "config": config,
    }
    where = api.context(tmp_path / "store", tmp_path / "cache")
    assert api.train(load_recipe(values), tmp_path / "run", where).step == 2
    student, teacher = load_denoiser(tmp_path / "run" / "model"), load_denoiser(pipeline)
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)

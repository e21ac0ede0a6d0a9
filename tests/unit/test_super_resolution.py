"""Small pictures as a condition: data, network, folder, figures, preview and the card's code."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from distill_core.data import build_source
from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink, small_shape
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds import find_kind
from distill_core.kinds.denoiser.card import Evaluate
from distill_core.kinds.denoiser.evaluation import Evaluator
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_codec, build_denoiser
from distill_core.networks.enlarging import enlarge
from distill_core.networks.generation import generate, true_pictures
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS

NAMES = ("UNet2DModel", "DiTTransformer2DModel")


def made(name="UNet2DModel", factor=2, shape=(1, 8, 8), **given):
    torch.manual_seed(0)
    network = NetworkConfig(name=name, args=TINY_NETWORKS[name])
    made = build_denoiser(
        network, parameterisation="v", shape=shape, num_classes=None, low_resolution=factor, **given
    )
    for value in made.parameters():  # some layers begin at zero, and would hide what is shown
        torch.nn.init.normal_(value, std=0.2)
    made.sampler = few_step_sampler(made, student_levels(made))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def digits():
    return build_source({"name": "digits", "split": "test"})


def test_a_smaller_picture_follows_from_a_larger_one_on_torch_and_numpy_alike():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 12, 24)
    torch.testing.assert_close(shrink(x, 6), shrink(shrink(x, 2), 3))
    np.testing.assert_allclose(shrink(x.numpy(), 4), shrink(x, 4), atol=1e-6)
    assert shrink(x, 4)[1, 0, 2, 5] == pytest.approx(float(x[1, 0, 8:12, 20:24].mean()), abs=1e-6)
    level = torch.full((1, 2, 3, 6), 0.3)
    torch.testing.assert_close(enlarge(level, (2, 12, 24)), torch.full((1, 2, 12, 24), 0.3))


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_that_is_enlarged_decides_each_item_alone(name):
    denoiser = made(name)
    torch.manual_seed(1)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 2.0, 7.0])
    low = torch.randn(3, 1, 4, 4)
    plain = denoiser(x, sigma, {LOW_RESOLUTION: low})
    other = denoiser(x, sigma, {LOW_RESOLUTION: low + torch.tensor([0.0, 0.7, 0.0])[:, None, None, None]})
    moved = (plain - other).abs().amax((1, 2, 3))
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() < 1e-5
    assert plain.shape == x.shape
    grey = denoiser(x, sigma, {LOW_RESOLUTION: torch.zeros(3, 1, 4, 4)})
    torch.testing.assert_close(denoiser(x, sigma), grey)  # nothing given


@pytest.mark.parametrize("side", [3, 5, 16])
def test_a_small_picture_that_does_not_divide_is_refused_by_its_name(side):
    denoiser = made()
    with pytest.raises(ConfigError, match=f"{side} x {side} pixels") as refused:
        denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1), {LOW_RESOLUTION: torch.zeros(1, 1, side, side)})
    assert refused.value.field == LOW_RESOLUTION


def test_a_factor_that_does_not_divide_the_pictures_is_refused_by_its_name(digits):
    with pytest.raises(ConfigError, match="8 x 8 pixels do not divide by 3") as refused:
        made(factor=3)
    assert refused.value.field == "config.factor"
    with pytest.raises(ConfigError, match="8 x 8 pixels do not divide by 3"):
        build_source({"name": "digits"}).shrink_by(3)
    with pytest.raises(ConfigError, match="24 x 12"):
        small_shape((1, 12, 24), 5)


def test_a_model_that_enlarges_is_not_guided():
    denoiser, cond = made(), {LOW_RESOLUTION: torch.randn(2, 1, 4, 4)}
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 2.0])
    assert torch.equal(denoiser.guided(x, sigma, cond, 1.0), denoiser(x, sigma, cond))
    with pytest.raises(ConfigError, match="a model that enlarges pictures has none") as refused:
        denoiser.guided(x, sigma, cond, 1.7)
    assert refused.value.field == "guidance"
    with pytest.raises(ConfigError, match="guidance"):
        denoiser.sampler.check_guidance(1.7)


def test_a_class_that_reads_prompts_cannot_enlarge():
    network = NetworkConfig(name="UNet2DConditionModel")
    with pytest.raises(ConfigError, match="cannot enlarge pictures") as refused:
        build_denoiser(
            network, parameterisation="v", shape=(1, 8, 8), num_classes=None, low_resolution=2, prompts=["a"]
        )
    assert refused.value.field == "network.name"


def test_data_is_conditioned_on_its_own_pictures_as_they_are_seen(digits):
    source = build_source({"name": "digits", "view": {"flip": True, "shift": 1}})
    find_kind("denoiser").fit(made(), source)
    batch = source.batch(16, epoch_seed=3, position=1)
    assert set(batch.cond) == {LOW_RESOLUTION}
    torch.testing.assert_close(batch.cond[LOW_RESOLUTION], shrink(batch.x0, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_loads_again_with_its_factor(name, tmp_path):
    denoiser = made(name, factor=4)
    denoiser.save(tmp_path)
    loaded = load_denoiser(tmp_path)
    assert (loaded.cond.kind, loaded.cond.factor) == (LOW_RESOLUTION, 4)
    cond = {LOW_RESOLUTION: torch.randn(2, 1, 2, 2)}
    torch.testing.assert_close(generate(loaded, cond, 2), generate(denoiser, cond, 2), rtol=0, atol=1e-5)
    assert not (tmp_path / "model_index.json").exists(), "no pipeline of diffusers shows a network a picture"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"kind": "none", "factor": None}, "in_channels = 2 and out_channels = 1"),
        ({"kind": "low_resolution", "factor": 3}, "do not divide by 3"),
        ({"kind": "none", "factor": 2}, "a factor"),
    ],
)
def test_a_folder_whose_factor_does_not_fit_is_refused(edit, said, tmp_path):
    made().save(tmp_path)
    path = tmp_path / "distillery.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "cond": {**table["cond"], **edit}}))
    with pytest.raises(ArtifactError, match=said):
        load_denoiser(tmp_path)


def test_a_latent_model_is_shown_the_latent_of_the_enlarged_picture():
    codec = build_codec(
        {"block_out_channels": [8, 8], "latent_channels": 3, "norm_num_groups": 4}, (1, 16, 16)
    )
    denoiser = made(factor=4, shape=(1, 16, 16), codec=codec)
    assert denoiser.network.config.in_channels == 6
    torch.manual_seed(2)
    low = torch.randn(2, 1, 4, 4)
    x = torch.randn(2, 3, 8, 8)
    shown = torch.cat([x, denoiser.encode(enlarge(low, (1, 16, 16)))], 1)
    torch.testing.assert_close(denoiser._beside(x, {LOW_RESOLUTION: low}), shown)
    assert generate(denoiser, {LOW_RESOLUTION: low}, 2).shape == (2, 1, 16, 16)


def test_figures_compare_what_is_enlarged_with_the_picture_it_was_made_small_from(digits):
    denoiser = made()
    evaluator = Evaluator(digits, Evaluate(num_samples=12, batch_size=5))
    figures = evaluator.figures(denoiser)
    truth = true_pictures(digits, range(12), 12)
    cond = {LOW_RESOLUTION: shrink(truth, 2)}
    made_of_it = generate(denoiser, cond, 12, seed=evaluator.config.seed, batch_size=5)
    for name, pictures in (("psnr", made_of_it), ("enlarged_psnr", enlarge(cond[LOW_RESOLUTION], (1, 8, 8)))):
        errors = ((pictures - truth) / 2).square().mean((1, 2, 3)).double()
        assert figures[name] == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-4), name
    assert figures["psnr"] != pytest.approx(figures["enlarged_psnr"], abs=0.1)


def test_a_preview_enlarges_pictures_of_the_data(digits):
    kind, denoiser = find_kind("denoiser"), made()
    shown = kind.preview(denoiser, digits, 3, {})
    cond = {LOW_RESOLUTION: shrink(true_pictures(digits, range(40)), 2)}
    torch.testing.assert_close(shown, generate(denoiser, cond, 40, seed=3))
    assert kind.image_probe(denoiser).difference(shown[0].numpy()) > 0.01


def test_the_code_on_the_card_makes_what_the_sampler_makes(tmp_path, monkeypatch):
    denoiser = made()
    denoiser.save(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S).group(1)
    noise, small = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 4, 4)
    code = code.replace("torch.zeros(4, 1, 4, 4)", "given")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "randn", lambda *size, **options: noise)
    variables = {"given": small}
    exec(compile(code, "README.md", "exec"), variables)
    level = denoiser.sampler.sigmas[0]
    wanted = denoiser(denoiser.sampler.noise_scale * noise, torch.full((4,), level), {LOW_RESOLUTION: small})
    torch.testing.assert_close(variables["x0"], wanted, rtol=0, atol=2e-3)

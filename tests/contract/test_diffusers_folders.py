"""Folders that plain diffusers writes are teachers, and what we write plain diffusers reads."""

from __future__ import annotations

import diffusers
import pytest
import torch

from distill_core import api
from distill_core.artifacts import ArtifactStore
from distill_core.errors import ArtifactError, ConfigError, DataError, NotFound
from distill_core.kinds.cards import generator_card
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS as NETWORKS
from tests.helpers import tiny_text_to_image


def new_denoiser(name: str, parameterisation: str, num_classes: int | None = 10):
    torch.manual_seed(0)
    config = NetworkConfig(name=name, args=NETWORKS[name])
    return build_denoiser(config, parameterisation=parameterisation, shape=(1, 8, 8), num_classes=num_classes)


@pytest.mark.parametrize("parameterisation", ["edm", "eps", "v", "flow"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_saved_denoiser_loads_with_the_same_output_and_opens_in_plain_diffusers(
    name, parameterisation, tmp_path
):
    denoiser = new_denoiser(name, parameterisation)
    denoiser.save(tmp_path)
    again = load_denoiser(tmp_path)
    x, sigma, cond = (
        torch.randn(3, 1, 8, 8),
        torch.tensor([0.1, 1.0, 9.0]),
        {"class_label": torch.tensor([1, 2, 10])},
    )
    with torch.no_grad():
        assert torch.equal(denoiser(x, sigma, cond), again(x, sigma, cond))
    slot = "transformer" if "Transformer" in name else "unet"
    plain = getattr(diffusers, name).from_pretrained(tmp_path / slot)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in denoiser.parameters())
    assert (again.image, again.cond, again.sampler) == (denoiser.image, denoiser.cond, denoiser.sampler)


def test_an_unconditional_ddpm_is_a_plain_diffusers_pipeline(tmp_path):
    new_denoiser("UNet2DModel", "eps", num_classes=None).save(tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline, diffusers.DDPMPipeline)
    assert len(pipeline(batch_size=2, num_inference_steps=2, output_type="np").images) == 2


def test_guidance_mixes_the_null_class_and_one_is_off():
    denoiser = new_denoiser("DiTTransformer2DModel", "edm")
    x, sigma, cond = torch.randn(2, 1, 8, 8), torch.ones(2), {"class_label": torch.tensor([1, 2])}
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        on, off = denoiser(x, sigma, cond), denoiser(x, sigma, denoiser.null_cond(2))
        assert torch.allclose(denoiser.guided(x, sigma, cond, 3.0), off + 3 * (on - off), atol=1e-5)
        assert torch.equal(denoiser.guided(x, sigma, cond, 1.0), on)


def test_a_pictures_noise_depends_on_its_own_seed_and_index_not_on_the_batch():
    denoiser = new_denoiser("UNet2DModel", "edm")
    cond = {"class_label": torch.arange(6)}
    whole = generate(denoiser, cond, 6, seed=3, num_steps=2)
    parts = generate(denoiser, cond, 6, seed=3, num_steps=2, batch_size=2)
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture
def text_recipe(text_folder):
    return load_recipe(
        {
            "method": "dmd2",
            "steps": 2,
            "batch_size": 2,
            "threads": 1,
            "teacher": {"path": str(text_folder)},
            "data": {"name": "prompts", "prompts": ["a cat", "a dog", "two cats"]},
            "config": {"critic_steps": 1, "guidance": 3.0, "levels": [14.0, 2.0]},
            "publish": {"name": "text-student"},
        }
    )


def test_a_text_to_image_folder_is_distilled_published_and_opens_in_diffusers(text_recipe, tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    result = api.train(text_recipe, tmp_path / "run", where, job="job-1")
    assert result.manifest is not None
    assert generator_card(result.manifest).cond.kind == "prompt"
    assert generator_card(result.manifest).sampler.sigmas == pytest.approx(
        (14.0, 2.0), rel=4e-3
    )  # whole timesteps
    folder = ArtifactStore(tmp_path / "store").fetch("text-student")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline("a cat", num_inference_steps=1, height=16, width=16, output_type="np").images.shape == (
        1,
        16,
        16,
        3,
    )
    student = api.load("text-student", where)
    pictures = generate(student, student.encode_prompts(["a cat", "a dog"]), 2)
    assert pictures.shape == (2, 3, 16, 16)
    assert not torch.equal(pictures[0], pictures[1])


def test_a_foreign_pipeline_is_read_through_its_own_schedule(text_folder):
    denoiser = load_denoiser(text_folder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(text_folder)
    prompt = denoiser.encode_prompts(["a cat"])
    latent, time = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        eps = pipeline.unet(latent, time, encoder_hidden_states=prompt["prompt_embeds"]).sample
    alpha = pipeline.scheduler.alphas_cumprod[500].sqrt()
    sigma = ((1 - alpha**2).sqrt() / alpha).reshape(1)
    with torch.no_grad():
        x0 = denoiser(latent / alpha, sigma, prompt)
    assert torch.allclose(x0, (latent - (1 - alpha**2).sqrt() * eps) / alpha, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"data": {"name": "digits"}}, DataError, "shape"),
        ({"data": {"name": "classes", "num_classes": 3}}, ConfigError, "needs prompts"),
        ({"data": {"name": "prompts", "prompts": []}}, DataError, "holds no prompt"),
        ({"teacher": {"path": "/nonexistent/model"}}, NotFound, "does not exist"),
        ({"config": {"levels": [14.0], "gan_weight": 0.1}}, ConfigError, "needs real pictures"),
    ],
)
def test_what_does_not_fit_a_text_to_image_teacher_is_said_before_training(
    text_recipe, changes, error, sentence, tmp_path
):
    values = text_recipe.model_dump(mode="json", exclude_none=True) | changes
    with pytest.raises(error, match=sentence):
        api.train(load_recipe(values), tmp_path / "run", api.context(tmp_path / "store", tmp_path / "cache"))


def test_a_damaged_or_pickled_folder_is_one_sentence(tmp_path):
    denoiser = new_denoiser("UNet2DModel", "edm")
    denoiser.save(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="damaged or incomplete"):
        load_denoiser(tmp_path)
    weights.rename(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ArtifactError, match="only safetensors are loaded"):
        load_denoiser(tmp_path)
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as a diffusers config"):
        load_denoiser(tmp_path)
    with pytest.raises(ArtifactError, match="not a diffusers folder"):
        load_denoiser(tmp_path / "scheduler")

"""Text-to-image folders of every kind are teachers, and their students open in plain diffusers again."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.artifacts import ArtifactStore
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.cards import generator_card
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.generation import generate
from distill_core.recipe import load_recipe
from tests.helpers import tiny_context, tiny_recipe, tiny_sdxl, tiny_text_to_image, tiny_trainer

UNET = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 1,
    "norm_num_groups": 4,
}
METHODS = {
    "dmd2": {"critic_steps": 1, "guidance": 3.0, "levels": [14.0]},
    "swiftbrush": {"lora": {"rank": 2}, "condition_dropout": 0.5},
    "boot": {"num_jumps": 3, "guidance": 3.0},
    "boss": {"num_steps": 1, "walk_steps": 4, "probes": 3, "held_out": 2, "guidance": 3.0},
    "instaflow": {"reflow_steps": 1, "flow_steps": 2, "held_out": 2},
    "slimflow": {"reflow_steps": 1, "anneal_steps": 1, "held_out": 2},
}
PAIRED = "boss", "instaflow", "slimflow"  # by stored pairs of noise and picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("folders")
    return {
        "sd21": tiny_text_to_image(root / "sd21", prediction="v_prediction"),
        "sdxl": tiny_sdxl(root / "sdxl"),
    }


def distilled(folder, method, tmp_path, **changes):
    values = {
        "method": method,
        "steps": 2 if method in ("instaflow", "slimflow") else 1,  # of each stage one
        "batch_size": 2,
        "threads": 1,
        "teacher": {"path": str(folder)},
        "data": {"name": "prompts", "prompts": ["a cat", "a dog", "two cats"]},
        "config": METHODS.get(method, {}),
        "publish": {"name": "student"},
    }
    if method in PAIRED:
        values["pairs"] = {"count": 5, "num_steps": 2, "guidance": 3.0}
    where = api.context(tmp_path / "store", tmp_path / "cache")
    return api.train(load_recipe(values | changes), tmp_path / "run", where, job="job-1")


def opened(pipeline, tmp_path):
    """The student as a plain diffusers pipeline, and as ours."""
    folder = ArtifactStore(tmp_path / "store").fetch("student")
    return pipeline.from_pretrained(folder), load_denoiser(folder)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_sdxl_is_distilled_published_and_opens_in_diffusers(folders, method, tmp_path):
    result = distilled(folders["sdxl"], method, tmp_path)
    cond = generator_card(result.manifest).cond
    assert (cond.kind, cond.embed_dim, cond.pooled_dim) == ("prompt", 32, 12)
    assert cond.examples == ("a cat", "a dog", "two cats")
    pipeline, student = opened(diffusers.StableDiffusionXLPipeline, tmp_path)
    made = pipeline("a cat", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert made.shape == (1, 16, 16, 3)
    assert pipeline.config.force_zeros_for_empty_prompt is True
    pictures = generate(student, student.encode_prompts(["a cat", "a dog"]), 2)
    assert pictures.shape == (2, 3, 16, 16)
    assert not torch.equal(pictures[0], pictures[1])


def test_a_smaller_network_may_stand_in_for_sdxls(folders, tmp_path):
    args = {**UNET, "block_out_channels": [16, 16], "norm_num_groups": 8}
    student = {"network": {"name": "UNet2DConditionModel", "args": args}}
    distilled(folders["sdxl"], "dmd2", tmp_path, student=student)
    pipeline, _ = opened(diffusers.StableDiffusionXLPipeline, tmp_path)
    made = pipeline("a cat", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert made.shape == (1, 16, 16, 3)
    assert isinstance(pipeline.unet.down_blocks[0], diffusers.models.unets.unet_2d_blocks.DownBlock2D)


def test_a_v_predicting_folder_is_distilled_published_and_opens_in_diffusers(folders, tmp_path):
    assert generator_card(distilled(folders["sd21"], "dmd2", tmp_path).manifest).parameterisation == "v"
    pipeline, _ = opened(diffusers.StableDiffusionPipeline, tmp_path)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    made = pipeline("a cat", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert made.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_a_foreign_folder_is_read_as_its_own_pipeline_reads_it(folders, name):
    denoiser = load_denoiser(folders[name])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    latent, step = torch.randn(2, 4, 8, 8), 500
    alpha = pipeline.scheduler.alphas_cumprod[step].sqrt()
    sigma_vp = (1 - alpha**2).sqrt()
    with torch.no_grad():
        embeds = pipeline.encode_prompt(["a cat", "a dog"], "cpu", 1, False) if name == "sd21" else None
        if embeds is None:
            embeds, _, pooled, _ = pipeline.encode_prompt(["a cat", "a dog"])
            times = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 12).repeat(2, 1)
            extras = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
        else:
            embeds, extras = embeds[0], {}
        output = pipeline.unet(latent, step, encoder_hidden_states=embeds, **extras).sample
        expected = (
            alpha * latent - sigma_vp * output if name == "sd21" else (latent - sigma_vp * output) / alpha
        )
        sigma = (sigma_vp / alpha).expand(2)
        found = denoiser(latent / alpha, sigma, denoiser.encode_prompts(["a cat", "a dog"]))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_sdxl_is_told_the_size_of_its_own_pictures(folders):
    denoiser = load_denoiser(folders["sdxl"])
    told = []
    denoiser.network.register_forward_pre_hook(
        lambda _module, _args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    denoiser(torch.zeros(2, 4, 8, 8), torch.ones(2), denoiser.null_cond(2))
    assert told[0].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_a_refiner_and_a_network_without_its_text_encoder_are_refused(folders, tmp_path):
    folder = tmp_path / "refiner"
    shutil.copytree(folders["sdxl"], folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ArtifactError, match=r"conditioned on text, and .* has no text_encoder/"):
        load_denoiser(folder)
    shutil.copytree(folders["sdxl"] / "text_encoder", folder / "text_encoder")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ArtifactError, match=r"told more than a prompt \(text_time\)"):
        load_denoiser(folder)


@pytest.fixture
def captioned(tmp_path):
    for index in range(6):
        colour = ["red", "green", "blue"][index % 3]
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a {colour} wall")
    return {"name": "images", "path": str(tmp_path / "pictures")}


def taught(name, data, tmp_path):
    """The folder of a text-conditional teacher after one step, without the pictures that a run draws at its end."""
    network = {"name": "UNet2DConditionModel", "args": UNET}
    trainer = tiny_trainer(name, tiny_context(tmp_path), tmp_path / "run", data=data, network=network)
    trainer.train_step()
    trainer.method.main.save(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("name", ["edm_digits", "ddpm_digits", "flow_matching_digits"])
def test_a_teacher_learns_from_pictures_and_captions(name, captioned, tmp_path):
    teacher = load_denoiser(taught(name, captioned, tmp_path))
    assert (teacher.cond.kind, teacher.cond.max_tokens, teacher.cond.embed_dim) == ("prompt", 5, 32)
    assert teacher.cond.examples == ("a red wall", "a green wall", "a blue wall")
    prompts = teacher.encode_prompts(["a red wall", "a blue wall"])["prompt_embeds"]
    assert not torch.equal(prompts[0], prompts[1])


def test_a_student_learns_from_a_teacher_of_captioned_pictures(captioned, tmp_path):
    folder = taught("edm_digits", captioned, tmp_path)
    recipe = tiny_recipe(
        "dmd2", data=captioned, teacher={"path": str(folder)}, **{"config.levels": [2.0], "steps": 1}
    )
    student = api.train(recipe, tmp_path / "student", tiny_context(tmp_path)).folder / "model"
    assert load_denoiser(student).cond == load_denoiser(folder).cond
    assert (student / "preview.png").exists()


def test_a_share_of_the_prompts_is_dropped_in_training(captioned, tmp_path):
    from distill_core.building import build

    network = {"name": "UNet2DConditionModel", "args": UNET}
    recipe = tiny_recipe(
        "edm_digits", data=captioned, network=network, **{"config.label_dropout": 0.5, "batch_size": 64}
    )
    method, source = build(recipe, tiny_context(tmp_path))
    seen = []
    method.teacher.register_forward_pre_hook(lambda _module, args: seen.append(args[2]["prompt_embeds"]))
    torch.manual_seed(0)
    batch = source.batch(64, epoch_seed=0, position=0)
    next(method.updates(batch, 0))
    null, given = method.teacher.null_cond(64)["prompt_embeds"], batch.cond["prompt_embeds"]
    dropped = (seen[0] == null).all((1, 2))
    assert 20 < dropped.sum() < 44
    assert torch.equal(seen[0][~dropped], given[~dropped])


def test_a_text_conditional_network_needs_prompts_and_a_fitting_width(captioned, tmp_path):
    where = tiny_context(tmp_path)
    network = {"name": "UNet2DConditionModel", "args": UNET}
    with pytest.raises(ConfigError, match="learns from prompts, and this data has none"):
        api.train(tiny_recipe("edm_digits", network=network), tmp_path / "a", where)
    network = {"name": "UNet2DConditionModel", "args": {**UNET, "cross_attention_dim": 7}}
    with pytest.raises(ConfigError, match="cross_attention_dim = 7 is not allowed"):
        api.train(tiny_recipe("edm_digits", data=captioned, network=network), tmp_path / "b", where)


def test_a_pixel_models_folder_has_no_pipelines_index(captioned, tmp_path):
    folder = taught("edm_digits", captioned, tmp_path)
    assert not (folder / "model_index.json").exists()
    assert json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"] == 32
    assert isinstance(
        diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"), diffusers.UNet2DConditionModel
    )

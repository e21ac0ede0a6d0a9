"""Every text-to-image folder is a teacher: planned, distilled, published, and open in plain diffusers again."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import pytest
import torch

from distill_core import api
from distill_core.artifacts import ArtifactStore
from distill_core.diffusion.sampling import sample
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_like
from distill_core.networks.fake_score import FakeScore
from distill_core.networks.families import FAMILIES
from distill_core.networks.families.base import token_map
from distill_core.networks.families.flux import packed, unpacked
from distill_core.networks.foreign.networks import NETWORKS
from distill_core.networks.generation import generate
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from distill_core.running.plan import plan
from tests.helpers import edited
from tests.tiny_pipelines import BUILDERS

METHODS = {
    "dmd2": {"critic_steps": 1, "guidance": 3.0},
    "swiftbrush": {"lora": {"rank": 2}, "condition_dropout": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("folders")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def test_every_network_class_has_its_keys_and_its_family():
    assert FAMILIES.keys() == NETWORKS.keys()
    prompted = {type(load).__name__ for load in FAMILIES.values() if load.guidance != 1 or load.pipeline}
    assert len(prompted) == len(BUILDERS) - 1  # Stable Diffusion and XL are one class


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_folder_is_distilled_published_and_read_again(name, method, folders, tmp_path):
    values = {
        "method": method,
        "steps": 1,
        "batch_size": 2,
        "threads": 1,
        "teacher": {"path": str(folders[name])},
        "data": {"name": "prompts", "prompts": ["a cat", "a dog", "two cats"]},
        "config": METHODS[method],
        "publish": {"name": "student"},
    }
    where = api.context(tmp_path / "store", tmp_path / "cache")
    api.train(load_recipe(values), tmp_path / "run", where, job="job-1")
    student = load_denoiser(ArtifactStore(tmp_path / "store").fetch("student"))
    assert student.image == load_denoiser(folders[name]).image
    pictures = generate(student, student.encode_prompts(["a cat", "a dog"]), 2)
    assert pictures.shape == (2, *student.image.picture)
    assert pictures.isfinite().all()
    assert not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_training_step_is_planned_without_reading_weights(name, folders, tmp_path):
    values = {
        "method": "dmd2",
        "steps": 1,
        "batch_size": 2,
        "threads": 1,
        "teacher": {"path": str(folders[name])},
        "data": {"name": "prompts", "prompts": ["a cat", "two dogs"]},
        "config": METHODS["dmd2"],
    }
    planned = plan(load_recipe(values), api.context(tmp_path / "store", tmp_path / "cache"))
    parts = {part.name: part for part in planned.parts}
    denoiser = load_denoiser(folders[name])
    assert parts["student"].parameters == sum(value.numel() for value in denoiser.network.parameters())
    encoders = sum(part.weights for part in planned.parts if "text encoder" in part.name)
    held = {id(value): value.nbytes for model in denoiser.text.models for value in model.parameters()}
    assert 0.9 * sum(held.values()) <= encoders <= 1.1 * sum(held.values())


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_head_reads_the_image_and_an_adapter_begins_as_its_base(name, folders):
    teacher = load_denoiser(folders[name])
    image = teacher.image
    x, sigma = torch.randn(2, image.channels, image.height, image.width), torch.tensor([0.7, 3.0])
    cond = teacher.encode_prompts(["a cat", "two dogs"])
    score = FakeScore(teacher, discriminate=True)
    x0, logits = score.with_logits(x, sigma, cond)
    assert torch.equal(x0, teacher(x, sigma, cond))
    moved = x.clone()
    moved[:, :, :2, :2] += 5  # one patch
    (before,), (after,) = (teacher.with_features(each, sigma, cond)[1] for each in (x, moved))
    assert before.shape[2] / before.shape[3] == image.height / image.width
    assert (after - before)[:, :, 0, 0].abs().mean() > (after - before)[:, :, -1, -1].abs().mean()
    adapter = LoraDenoiser(teacher, LoraConfig(rank=2))
    assert len(adapter.lora) > 0
    assert torch.equal(adapter(x, sigma, cond), teacher(x, sigma, cond))
    logits.sum().backward()
    assert score.head.last.weight.grad is not None


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_an_encoder_reads_as_its_pipelines_and_its_null_condition_is_the_empty_prompt(name, folders):
    denoiser = load_denoiser(folders[name])
    null, empty = denoiser.null_cond(3), denoiser.encode_negative([""])
    assert null.keys() == denoiser.encode_prompts(["a"]).keys()
    for key, value in null.items():
        assert value.shape == (3, *empty[key].shape[1:])
        if name != "sdxl":  # whose null condition is zeros
            assert torch.equal(value[1:2], empty[key])


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"sd"}))
def test_a_smaller_network_may_stand_in_for_it(name, folders):
    teacher = load_denoiser(folders[name])
    config = {key: value for key, value in teacher.network.config.items() if not key.startswith("_")}
    fewer = {key: 1 for key in ("num_layers", "n_layers", "layers_per_block") if key in config}
    own = {
        key: value
        for key, value in config.items()
        if key not in teacher.family.interface and value is not None
    }
    smaller = build_like(teacher, NetworkConfig(name=teacher.family.network, args={**own, **fewer}))
    x, sigma = torch.randn(1, teacher.image.channels, 8, 12), torch.tensor([2.0])
    with torch.no_grad():
        assert smaller(x, sigma, teacher.encode_prompts(["a cat"])).shape == x.shape


def test_a_network_reads_as_many_tokens_as_its_folder_says(folders, tmp_path):
    shutil.copytree(folders["flux"], tmp_path / "short")
    edited(tmp_path / "short", ".", "distillery.json", cond={**_cond(folders["flux"]), "max_tokens": 256})
    assert load_denoiser(tmp_path / "short").encode_prompts(["a cat"])["prompt_embeds"].shape == (1, 256, 24)


def _cond(folder):
    return json.loads((folder / "distillery.json").read_text())["cond"]


def noise_like(z, name):
    """Unit noise, drawn in the form in which the pipeline keeps its latents."""
    if name in ("flux", "qwen-image"):
        return unpacked(torch.randn_like(packed(z)), z)
    return (
        token_map(torch.randn(1, z[0, 0].numel(), z.shape[1]), z, 1)
        if name == "flux2"
        else torch.randn_like(z)
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"sd", "sdxl"}))
def test_a_students_picture_is_the_same_in_plain_diffusers(name, count, folders, tmp_path):
    denoiser = load_denoiser(folders[name])
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, count=count))
    denoiser.save(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (tmp_path / "README.md").read_text(), re.M | re.S)
    code = code.replace('from_pretrained(".")', f'from_pretrained("{tmp_path}")').replace(
        "images[0]", "images"
    )
    code = code.replace("**options", '**options, output_type="pt"').replace(
        "picture =", "torch.manual_seed(6)\npicture ="
    )
    variables: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), variables)
    image, drawn = denoiser.image, torch.Generator().manual_seed(0)
    z = torch.randn(1, image.channels, image.height, image.width, generator=drawn)
    cond = denoiser.encode_prompts(["a photograph"])
    torch.manual_seed(6)

    def denoise(x, sigma):
        return denoiser(x, x.new_full((1,), sigma), cond)

    with torch.no_grad():
        x0 = sample(denoise, denoiser.sampler, lambda k: noise_like(z, name) if k else z, count)
        wanted = (denoiser.decode(x0) / 2 + 0.5).clamp(0, 1)
    assert wanted.std() > 0.01, "a constant picture would hide every mistake"
    assert (variables["picture"] - wanted).abs().mean() * 255 <= 0.1


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_saved_folder_opens_in_plain_diffusers(name, folders, tmp_path):
    denoiser = load_denoiser(folders[name])
    denoiser.save(tmp_path / "saved")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipeline) is type(diffusers.DiffusionPipeline.from_pretrained(folders[name]))
    again = load_denoiser(tmp_path / "saved")
    x, sigma = torch.randn(1, again.image.channels, 8, 12), torch.tensor([2.0])
    with torch.no_grad():
        ours, theirs = (each(x, sigma, each.encode_prompts(["a cat"])) for each in (denoiser, again))
    assert torch.equal(ours, theirs)

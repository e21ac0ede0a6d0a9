"""Several networks as one: partitions of classes and prompts, routed denoisers in memory and on disk."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_core.artifacts import Manifest
from distill_core.diffusion.routing import class_parts, prompt_parts
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.cards import described, generator_card
from distill_core.kinds.loading import load_model
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_denoiser import DiffusersDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.generation import generate
from distill_core.networks.routed import ConditionPartition, RoutedDenoiser, StoredExperts
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from tests.helpers import tiny_text_to_image

DIT = NetworkConfig(
    name="DiTTransformer2DModel",
    args={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4},
)


def expert(seed: int) -> DiffusersDenoiser:
    torch.manual_seed(seed)
    denoiser = build_denoiser(DIT, parameterisation="edm", shape=(1, 8, 8), num_classes=10, num_steps=2)
    with torch.no_grad():  # a new DiT answers zero whatever it is asked
        for parameter in denoiser.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return denoiser


def routed(parts: int) -> RoutedDenoiser:
    return RoutedDenoiser([expert(part) for part in range(parts)], ConditionPartition.blocks(10, parts))


def inputs(count: int = 7) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x, torch.linspace(0.1, 5, count), {"class_label": torch.arange(count) * 3 % 10}


# -- partitions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "parts"), [(10, 5), (10, 3), (1000, 4), (7, 7)])
def test_consecutive_classes_fall_into_parts_of_equal_size(classes, parts):
    part = ConditionPartition.blocks(classes, parts).route({"class_label": torch.arange(classes)}, classes)
    sizes = part.bincount(minlength=parts)
    assert part.dtype == torch.int64
    assert sizes.max() - sizes.min() <= 1
    assert (part.diff() >= 0).all()


def test_listed_classes_go_where_the_lists_say_and_unknown_ones_to_the_default():
    partition = ConditionPartition.of_classes([[0, 3], [2, 1]], 4)
    labels = torch.tensor([0, 1, 2, 3, 4, 99, -1])  # 4 is the null class
    assert partition.route({"class_label": labels}, 7).tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert partition.route({}, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("classes", [[[0, 1], [1, 2]], [[0], [2]], [[0, 1], [2, 3]], [[0, 1, 2], []]])
def test_lists_that_are_no_partition_are_refused(classes):
    with pytest.raises(ConfigError):
        ConditionPartition.of_classes(classes, 3)


def test_more_parts_than_classes_or_prompts_are_refused():
    with pytest.raises(ConfigError, match="3 classes do not make 4 parts"):
        ConditionPartition.blocks(3, 4)
    with pytest.raises(ConfigError, match="do not make 3 parts"):
        ConditionPartition.of_prompts(torch.ones(5, 2), 3, seed=0)


def blobs(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Pooled prompts around far corners, and the corner of each."""
    generator = torch.Generator().manual_seed(0)
    corners = 10 * torch.eye(len(sizes), 16)
    corner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return corners[corner] + torch.randn(len(corner), 16, generator=generator), corner


def test_prompts_that_are_alike_share_a_part():
    embeds, corner = blobs((50, 50, 50, 50))
    part = ConditionPartition.of_prompts(embeds, 4, seed=0).route({"prompt_embeds": embeds[:, None]}, 200)
    assert len(torch.stack([part, corner]).unique(dim=1).T) == 4  # one to one


def test_prompt_parts_have_equal_sizes_even_where_the_clusters_do_not():
    embeds, _ = blobs((140, 40, 20))
    partition = ConditionPartition.of_prompts(embeds, 4, seed=0)
    sizes = partition.route({"prompt_embeds": embeds[:, None]}, 200).bincount(minlength=4)
    assert (sizes - 50).abs().max() <= 5
    plain = prompt_parts(embeds, partition.centroids, torch.zeros(4)).bincount(minlength=4)
    assert (plain - 50).abs().max() > 5


def test_a_seed_decides_the_clusters():
    embeds, _ = blobs((30, 30, 30))
    first, again = (ConditionPartition.of_prompts(embeds, 5, seed=3) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.offsets, again.offsets)


def test_numpy_routes_as_torch_does():
    embeds, _ = blobs((90, 30, 20))
    partition = ConditionPartition.of_prompts(embeds, 3, seed=0)
    arrays = embeds.numpy(), partition.centroids.numpy(), partition.offsets.numpy()
    assert prompt_parts(*arrays).tolist() == partition.route({"prompt_embeds": embeds[:, None]}, 140).tolist()
    labels, spec = np.array([-1, 0, 5, 9, 10]), ConditionPartition.blocks(10, 3).spec
    assert class_parts(labels, np.array(spec.table)).tolist() == [0, 0, 1, 2, 0]


def test_a_prompts_part_does_not_depend_on_its_batch():
    embeds, _ = blobs((90, 30, 20))
    partition = ConditionPartition.of_prompts(embeds, 3, seed=0)
    tokens = embeds[:, None].repeat(1, 4, 1)
    together = partition.route({"prompt_embeds": tokens}, 140)
    alone = [partition.route({"prompt_embeds": row[None]}, 1).item() for row in tokens]
    assert together.tolist() == alone


# -- denoisers ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_part_is_the_plain_denoiser_bit_for_bit():
    x, sigma, cond = inputs()
    one, plain = routed(1), expert(0)
    assert torch.equal(one(x, sigma, cond), plain(x, sigma, cond))
    assert torch.equal(one.guided(x, sigma, cond, 2.0), plain.guided(x, sigma, cond, 2.0))


@torch.no_grad()
def test_each_item_is_answered_by_its_own_expert_in_the_batchs_order():
    x, sigma, cond = inputs()
    model = routed(5)
    x0 = model(x, sigma, cond)
    for item, label in enumerate(cond["class_label"].tolist()):
        own = {"class_label": cond["class_label"][item : item + 1]}
        alone = model.experts[label // 2](x[item : item + 1], sigma[item : item + 1], own)
        torch.testing.assert_close(x0[item : item + 1], alone)
    features = model.with_features(x, sigma, cond)[1]
    assert [len(feature) for feature in features] == [7]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5, torch.linspace(0, 3, 7)])
def test_guidance_stays_with_the_expert_of_the_condition(guidance):
    x, sigma, cond = inputs()
    model = routed(5)
    x0 = model.guided(x, sigma, cond, guidance)
    scales = torch.as_tensor(guidance).expand(7)
    for item, label in enumerate(cond["class_label"].tolist()):
        own = {"class_label": cond["class_label"][item : item + 1]}
        alone = model.experts[label // 2].guided(
            x[item : item + 1], sigma[item : item + 1], own, scales[item : item + 1]
        )
        torch.testing.assert_close(x0[item : item + 1], alone)


def test_a_gradient_reaches_only_the_experts_that_answered():
    x, sigma, _ = inputs(3)
    model = routed(5)
    model(x, sigma, {"class_label": torch.tensor([2, 9, 3])}).sum().backward()
    reached = [any(p.grad is not None for p in expert.parameters()) for expert in model.experts]
    assert reached == [False, True, False, False, True]


@torch.no_grad()
def test_a_copy_has_experts_of_its_own():
    x, sigma, cond = inputs()
    model = routed(2)
    twin = copy.deepcopy(model)
    before = model(x, sigma, cond)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(model(x, sigma, cond), before)
    assert not torch.equal(twin(x, sigma, cond), before)


# -- folders ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_answers_alike_and_keeps_its_sampler(tmp_path):
    x, sigma, cond = inputs()
    model = routed(5)
    model.sampler = model.sampler.few_step((5.0,), noise_scale=5.0)
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, RoutedDenoiser)
    assert torch.equal(again(x, sigma, cond), model(x, sigma, cond))
    assert again.sampler == model.sampler
    assert generator_card(Manifest(name="m", **described(again))).partition == model.partition.spec
    plain = load_denoiser(tmp_path / "experts" / "3")  # each is a diffusers folder of its own
    assert torch.equal(plain(x, sigma, cond), model.experts[3](x, sigma, cond))


def test_experts_are_read_when_they_are_first_asked(tmp_path):
    routed(5).save(tmp_path)
    stored = StoredExperts(tmp_path)
    x, sigma, cond = inputs(1)
    stored(x, sigma, cond)
    shutil.rmtree(tmp_path / "experts" / "4")
    stored(x, sigma, cond)
    with pytest.raises(ArtifactError, match="lacks experts/4"):
        stored(x, sigma, {"class_label": torch.tensor([9])})


@pytest.mark.parametrize("damage", ["expert", "sidecar", "rule"])
def test_a_damaged_folder_is_refused_and_named(tmp_path, damage):
    routed(2).save(tmp_path)
    if damage == "expert":
        shutil.rmtree(tmp_path / "experts" / "1")
    elif damage == "sidecar":
        (tmp_path / "distillery.json").unlink()
    else:
        spec = {"kind": "class_label", "parts": 2, "of_class": [0, 0, 0]}
        (tmp_path / "distillery.json").write_text(json.dumps({"partition": spec}))
    with pytest.raises(ArtifactError, match="experts/1|partition"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "garbage", "other"])
def test_a_damaged_router_is_refused(tmp_path, damage):
    embeds, _ = blobs((20, 20, 20))
    partition = ConditionPartition.of_prompts(embeds, 3, seed=0)
    partition.save(tmp_path)
    assert torch.equal(ConditionPartition.load(tmp_path).centroids, partition.centroids)
    router = tmp_path / "router.safetensors"
    if damage == "missing":
        router.unlink()
    elif damage == "garbage":
        router.write_bytes(b"not a tensor")
    else:
        ConditionPartition.of_prompts(embeds, 2, seed=0).save(tmp_path / "two")
        shutil.copy(tmp_path / "two" / "router.safetensors", router)
    with pytest.raises(ArtifactError, match="partition"):
        ConditionPartition.load(tmp_path)


def test_low_rank_experts_share_one_base_and_are_saved_merged(tmp_path):
    base = expert(0)
    lora = LoraConfig(rank=2, targets="all-linear")
    student = LoraDenoiser(base, lora)
    model = RoutedDenoiser([copy.deepcopy(student) for _ in range(2)], ConditionPartition.blocks(10, 2))
    own = sum(p.numel() for p in student.parameters())
    assert sum(p.numel() for p in model.parameters()) == 2 * own
    x, sigma, cond = inputs()
    with torch.no_grad():
        for parameter in model.experts[1].parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        model.save(tmp_path)
        torch.testing.assert_close(load_model(tmp_path)(x, sigma, cond), model(x, sigma, cond))


def text_experts(folder: Path) -> RoutedDenoiser:
    denoiser = load_denoiser(tiny_text_to_image(folder))
    prompts = ["aa", "ab", "ba", "xx", "xy", "zz"]
    embeds = denoiser.encode_prompts(prompts)["prompt_embeds"].mean(1)
    other = copy.deepcopy(denoiser)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    return RoutedDenoiser([denoiser, other], ConditionPartition.of_prompts(embeds, 2, seed=0))


def test_a_text_model_keeps_its_router_and_what_its_experts_share_once(tmp_path):
    model = text_experts(tmp_path / "pipeline")
    model.save(tmp_path / "model")
    files = {
        path.relative_to(tmp_path / "model").as_posix()
        for path in (tmp_path / "model").rglob("*.safetensors")
    }
    assert "router.safetensors" in files
    assert sum("text_encoder" in file for file in files) == sum("vae" in file for file in files) == 1
    again = load_model(tmp_path / "model")
    assert again.experts[0].text is again.experts[1].text
    prompts = ["abc", "xyz", "q", "zzz"]
    cond = again.encode_prompts(prompts)
    assert set(again.partition.route(cond, 4).tolist()) == {0, 1}
    made, saved = (generate(m, cond, 4, seed=1, num_steps=2, guidance=1.0) for m in (model, again))
    assert made.shape == (4, 3, 16, 16)
    assert torch.equal(made, saved)

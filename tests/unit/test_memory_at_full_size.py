"""The page of memory at full size: its configs, and what it says fits where."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

from distill_core.networks.foreign.keys import defaults_of
from distill_core.recipe import load_recipe
from tools import memory
from tools.pipeline_folders import facts, model_names

PLAN = {
    "trained": 2_600_000_000,
    "frozen": 13 * 2**30,
    "standing": 42 * 2**30,
    "step": 7 * 2**30,
    "total": 49 * 2**30,
}


def entry(processes: dict[str, int | None], **more: object) -> dict[str, object]:
    return {"model": "sdxl", "plan": {**PLAN, "processes": processes}, **more}


@pytest.mark.parametrize("name", model_names())
def test_every_key_of_a_config_is_one_of_its_class(name):
    for part, made in facts(name)["parts"].items():
        if isinstance(made, str):
            assert made in ("clip", "t5"), part
        elif model := getattr(transformers, made["class"], None):
            config = model.config_class()
            assert all(hasattr(config, key) for key in made["config"]), part
        else:
            assert made["config"].keys() <= defaults_of(getattr(diffusers, made["class"])).keys(), part


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_network_of_the_config_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(**facts(name)["parts"]["unet"]["config"])
    assert sum(value.numel() for value in network.parameters()) == facts(name)["network_parameters"]


def test_every_recipe_for_a_model_has_a_config_and_may_be_planned():
    for name in memory.planned_recipes():
        recipe, _, other = name.partition(" on ")
        assert (other or load_recipe(recipe).for_model) in model_names()


def test_a_plan_is_of_one_picture_and_keeps_what_decides_memory(tmp_path):
    shipped = load_recipe("sdxl_dmd2_1step")
    alone = memory.one_picture(shipped, tmp_path / "model", tmp_path)
    assert (alone.batch_size, alone.accumulate, alone.config["critic_steps"]) == (1, 1, 1)
    assert (alone.student, alone.precision, alone.ema) == (shipped.student, shipped.precision, shipped.ema)
    assert alone.teacher.path == str(tmp_path / "model")
    assert alone.pairs is None


def test_the_smallest_change_is_named_in_order():
    fits = {"24": 8, "48": 4, "80": 2, "141": 2}
    said = [memory.smallest_change(entry(fits), card) for card in memory.CARDS]
    assert said == ["8 such devices", "4 such devices", "as it is", "as it is"]
    large = entry({"24": None, "48": 64, "80": 16, "141": 2})
    assert memory.smallest_change(large, 24) == "no"
    assert memory.smallest_change(large, 48) == "64 such devices"
    lora = {"total": 40 * 2**30, "processes": {"24": 2}}
    assert memory.smallest_change({**large, "lora": lora}, 48) == "a LoRA"
    assert memory.smallest_change({**large, "lora": lora}, 24) == "a LoRA on 2 such devices"


def test_the_page_has_a_row_of_each_plan():
    page = memory.page({"sdxl_dmd2": entry({"24": None, "48": 4, "80": 2, "141": 2})})
    row = "| `sdxl_dmd2` | Stable Diffusion XL | 2,600 M | 13.0 | 42.0 | 7.0 | 49.0 |"
    assert row in page
    assert "| `sdxl_dmd2` | no | 4 such devices | as it is | as it is |" in page

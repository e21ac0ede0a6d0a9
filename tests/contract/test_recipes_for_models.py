"""Every recipe for a published model builds and steps on a tiny random pipeline of that model's class."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.building import build
from distill_core.errors import ConfigError
from distill_core.method import Method
from distill_core.recipe import Recipe, load_recipe, recipe_names
from distill_core.recipe.published_models import PUBLISHED, check_teacher_fits
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from distill_service.jobs.specs import draft_train
from tests.helpers import changed, edited, parameters_by_module, tiny_sdxl, tiny_text_to_image
from tests.tiny_pipelines import small, tiny_flux, tiny_pixart

NAMES = [name for name in recipe_names() if load_recipe(name).for_model]


def stable_diffusion(folder):
    """A folder under the betas that Stable Diffusion has, whose timesteps the recipes name."""
    return edited(folder, "scheduler", "scheduler_config.json", beta_start=0.00085, beta_end=0.012)


BUILDERS = {
    "sd15": lambda folder: stable_diffusion(tiny_text_to_image(folder)),
    "sdxl": lambda folder: stable_diffusion(tiny_sdxl(folder)),
    "pixart": lambda folder: tiny_pixart(folder, alpha=True),
    "flux": small(tiny_flux, 8, 12),
}
FEW = {"critic_steps": 2, "fake_steps": 1, "regression_steps": 1}  # of the keys that count updates


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    for index, words in enumerate(("a cat", "two dogs")):
        (root / "pictures").mkdir(exist_ok=True)
        Image.effect_noise((20, 18), 60 + index).convert("RGB").save(root / "pictures" / f"{index}.png")
        (root / "pictures" / f"{index}.txt").write_text(words)
    (root / "prompts.txt").write_text("a cat\ntwo dogs\nabc\n")
    made = {name: make(root / name) for name, make in BUILDERS.items()}
    return {"root": root, **made, "sd21": made["sd15"]}  # they differ in sizes alone


def tiny(name: str, folders) -> Recipe:
    """The recipe with its user's teacher and data, small batches and few updates; all else is as it is shipped."""
    recipe = load_recipe(name)
    values = recipe.model_dump(mode="json", exclude_none=True)
    del values["publish"]  # an adapter alone is published over a base of the store
    pictures = recipe.data["name"] == "images"
    few = {f"config.{key}": count for key, count in FEW.items() if key in recipe.config}
    if recipe.pairs is not None:
        few |= {"pairs.count": 3, "pairs.num_steps": 2, "pairs.batch_size": 3}
    if pictures:
        few["data.size"] = 16
    return Recipe.parse(values).override(
        {
            "teacher.path": str(folders[recipe.for_model]),
            "data.path": str(folders["root"] / ("pictures" if pictures else "prompts.txt")),
            "batch_size": 2,
            "precision": "fp32",
            "threads": 1,
            **{f"optim.{role}.warmup_steps": 0 for role in recipe.optim},
            **few,
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_for_a_model_steps_and_moves_what_it_trains(name, folders, tmp_path):
    recipe = tiny(name, folders)
    method, source = build(recipe, api.context(tmp_path / "store", tmp_path / "cache"))
    assert set(recipe.optim) == set(method.roles)
    trainer = Trainer(method, source, recipe, Run(tmp_path / "run"))
    before, values = parameters_by_module(method), []
    for _ in range(len(method.stages(method.config, recipe.steps)) if recipe.pairs else 1):
        trainer.step = recipe.config.get("regression_steps", 0) if values else 0
        trainer.enter_next()
        values.append(trainer.train_step())
    assert all(torch.isfinite(torch.as_tensor(value)).all() for found in values for value in found.values())
    after = parameters_by_module(method)
    moved = {child for child in after if changed(before[child], after[child])}
    assert moved - set(method.held) == set(method.roles)
    check_levels(name, method)


def check_levels(name: str, method: Method) -> None:
    """The student's levels are the timesteps that stand beside them in the recipe's file; FLUX's are flow times."""
    text = (resources.files("distill_core.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    levels = method.student.sampler.sigmas
    if load_recipe(name).for_model == "flux":
        times = [level / (1 + level) for level in levels]
        assert times == pytest.approx([0.999 * share for share in (1, 0.75, 0.5, 0.25)], abs=2e-4)
        return
    (named,) = re.findall(r"# timesteps? ([\d, ]+)", text)
    found = method.teacher.schedule.network_time(torch.tensor(levels)).round().tolist()
    wanted = [int(one) for one in named.split(", ")]
    assert found[: len(wanted)] == wanted
    if load_recipe(name).method == "lcm":  # as diffusers' LCMScheduler takes four steps of fifty
        four = method.teacher.schedule.network_time(torch.tensor(method.student.sampler.levels(4)))
        assert four.round().tolist() == [999, 759, 499, 259]


def test_every_published_model_has_a_recipe_and_a_tiny_pipeline():
    assert PUBLISHED.keys() == {*BUILDERS, "sd21"} == {load_recipe(name).for_model for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_teacher_and_data_are_all_that_a_person_gives(name, folders):
    with pytest.raises(ConfigError, match=f"these settings are for {re.escape(title(name))}") as caught:
        draft_train(name=name)
    assert caught.value.field == "teacher"
    given = draft_train(name=name, overrides={"teacher.artifact": "mine@1", "data.path": "/data/prompts.txt"})
    assert given.spec["recipe"]["teacher"] == {"artifact": "mine@1"}
    assert "replaced" not in given.spec["recipe"]


def title(name: str) -> str:
    return PUBLISHED[load_recipe(name).for_model].title


def test_a_missing_teacher_is_named_before_anything_is_built(tmp_path):
    with pytest.raises(ConfigError, match="set teacher.artifact=my-flux@1"):
        build(load_recipe("flux_dmd2"), api.context(tmp_path / "store", tmp_path / "cache"))


def test_a_teacher_of_another_class_is_refused(folders, tmp_path):
    recipe = tiny("sdxl_dmd2", folders).override({"teacher.path": str(folders["sd15"])})
    with pytest.raises(
        ConfigError, match="for Stable Diffusion XL, and the teacher is a UNet2DConditionModel"
    ):
        build(recipe, api.context(tmp_path / "store", tmp_path / "cache"))
    check_teacher_fits("flux", "FluxTransformer2DModel", pooled=True)

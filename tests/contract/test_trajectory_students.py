"""Students along a trajectory learn from text-to-image folders, whole or as low-rank factors, and are served."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.errors import ConfigError
from distill_core.kinds.cards import generator_card
from distill_core.networks.generation import generate
from distill_core.recipe import load_recipe
from tests.helpers import tiny_sdxl, tiny_text_to_image

LORA = {"student": {"lora": {"rank": 2, "alpha": 2.0}}}
WHOLE = {"student": {}}
METHODS = {
    "progressive": {"config": {"start_steps": 2}},
    "consistency": {"config": {"num_levels": 4}},
    "lcm": {"config": {"num_levels": 8}},
    "tscd": {"config": {"num_levels": 8, "segments": [2, 1]}},
    "mlcm": {"config": {"num_levels": 8, "segments": [4, 2], "states": 2}},
    "scott": {"config": {"num_levels": 4, "lora": {"rank": 2}}},
    "lora_guidance": {},
    "guided": {},
    "slam": {"config": {"num_levels": 8}},
    "agd": {"config": {"walk_steps": 3, "guidance_max": 5.0}, "pairs": {"count": 4, "num_steps": 1}},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(4):
        Image.new("RGB", (16, 16), ["red", "blue"][index % 2]).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {['red', 'blue'][index % 2]} wall")
    return {"name": "images", "path": str(folder)}


@pytest.mark.parametrize("form", ["whole", "lora"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_text_to_image_folder_becomes_a_student_that_is_served_with_its_own_steps(
    name, form, pictures, tmp_path
):
    if (name, form) in (("lora_guidance", "whole"), ("guided", "lora"), ("slam", "lora"), ("agd", "lora")):
        pytest.skip("factors alone learn the first, and have no place for what the others are told")
    folder = (tiny_sdxl if form == "lora" else tiny_text_to_image)(tmp_path / "pipeline")
    own = {"name": "prompts", "prompts": ["a cat", "a dog"]} if name == "mlcm" else pictures
    recipe = load_recipe(
        {
            "method": name,
            "steps": 2,
            "batch_size": 4,
            "threads": 1,
            "teacher": {"path": str(folder)},
            "data": own,
            "publish": {"name": "text-student"},
            "evaluate": {"num_samples": 4},
            **(LORA if form == "lora" else WHOLE),
            **METHODS[name],
        }
    )
    where = api.context(tmp_path / "store", tmp_path / "cache")
    result = api.train(recipe, tmp_path / "run", where, job="job-1")
    assert result.manifest is not None
    sampler = generator_card(result.manifest).sampler
    assert not sampler.guidable
    assert sampler.guidance_range == ((1.0, 5.0) if name in ("guided", "agd") else None)
    student = api.load("text-student", where)
    cond = student.encode_prompts(["a cat", "a dog"])
    steps = min(sampler.step_counts, default=1)
    made = generate(student, cond, 2, num_steps=steps)
    assert made.shape == (2, 3, 16, 16)
    assert not torch.equal(made[0], made[1])
    if name in ("lcm", "tscd"):
        with pytest.raises(ConfigError, match="num_steps = 3 is not allowed") as error:
            sampler.levels(3)
        assert error.value.field == "num_steps"

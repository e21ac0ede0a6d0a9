"""Methods that need no picture run on labels alone and on prompts alone."""

from __future__ import annotations

import pytest
import torch

from distill_core import api
from distill_core.building import build
from distill_core.kinds.cards import generator_card
from distill_core.methods import find_method, method_names, needs
from distill_core.networks.generation import generate
from distill_core.recipe import load_recipe
from tests.helpers import recipe_of, tiny_text_to_image, tiny_trainer

IMAGE_FREE = ["pg_sb", "swiftbrush"]
ROLLED_OUT = [
    "agd",
    "boot",
    "boss",
    "instaflow",
    "rf_pp",
    "slimflow",
]  # from noise, whose pictures the teacher makes


@pytest.mark.parametrize("name", [*IMAGE_FREE, *ROLLED_OUT])
def test_an_image_free_method_asks_for_no_data_and_trains_on_class_labels(name, context, tmp_path):
    assert name in method_names()
    assert "data" not in needs(find_method(name))
    trainer = tiny_trainer(
        recipe_of(name), context, tmp_path, steps=3, data={"name": "classes", "num_classes": 10}
    )
    assert trainer.source.shape is None
    assert trainer.train().step == 3


@pytest.mark.parametrize("name", IMAGE_FREE)
def test_a_text_to_image_folder_is_distilled_from_prompts_alone(name, tmp_path):
    folder = tiny_text_to_image(tmp_path / "pipeline")
    recipe = load_recipe(
        {
            "method": name,
            "steps": 2,
            "batch_size": 2,
            "threads": 1,
            "teacher": {"path": str(folder)},
            "data": {"name": "prompts", "prompts": ["a cat", "a dog", "two cats"]},
            "config": {"lora": {"rank": 2}, "condition_dropout": 0.5},
            "publish": {"name": "text-student"},
        }
    )
    where = api.context(tmp_path / "store", tmp_path / "cache")
    result = api.train(recipe, tmp_path / "run", where, job="job-1")
    assert result.manifest is not None
    assert not generator_card(result.manifest).sampler.guidable
    student = api.load("text-student", where)
    pictures = generate(student, student.encode_prompts(["a cat", "a dog"]), 2)
    assert pictures.shape == (2, 3, 16, 16)
    assert not torch.equal(pictures[0], pictures[1])


def test_prompts_that_the_encoder_cuts_are_said_once(tmp_path, caplog):
    folder = tiny_text_to_image(tmp_path / "pipeline")  # 8 tokens, two of them mark the beginning and the end
    data = {"name": "prompts", "prompts": ["abcdefg", "abcdef", "abcdefg", "hijklmnop"]}
    recipe = load_recipe(
        {"method": "swiftbrush", "steps": 1, "threads": 1, "teacher": {"path": str(folder)}, "data": data}
    )
    build(recipe, api.context(tmp_path / "store", tmp_path / "cache"))
    said = [record.message for record in caplog.records if "text encoder" in record.message]
    assert said == [
        "2 prompts are longer than the 8 tokens that the text encoder reads, and their ends are left out; "
        "the first begins with 'abcdefg'"
    ]

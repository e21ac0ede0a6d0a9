"""The shipped recipes on data that users have: a folder of PNGs, parquet, a Blender scene."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from distill_core import api
from distill_core.errors import ArtifactError, ConfigError
from tests.helpers import SHARED_DATA, tiny_recipe

NETWORK = {
    "name": "DiTTransformer2DModel",
    "args": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8},
}


@pytest.fixture
def png_folder(tmp_path):
    generator = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for index in range(6):
            pixels = generator.integers(0, 255, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{index}.png")
    return tmp_path / "pictures"


def train(name, tmp_path, context, **changes):
    recipe = tiny_recipe(name, **changes)
    return api.train(recipe, tmp_path / "run", context)


@pytest.mark.parametrize("name", ["edm_digits", "ddpm_digits", "flow_matching_digits"])
def test_a_teacher_recipe_trains_on_a_folder_of_pngs(name, png_folder, tmp_path, context):
    data = {"name": "images", "path": str(png_folder), "size": 16}
    result = train(name, tmp_path, context, data=data, network=NETWORK)
    assert (result.folder / "model" / "preview.png").exists()


def test_a_student_is_distilled_from_an_own_teacher_on_own_pictures(png_folder, tmp_path, context):
    data = {"name": "images", "path": str(png_folder), "size": 16}
    teacher = train("edm_digits", tmp_path / "teacher", context, data=data, network=NETWORK)
    source = {"path": str(teacher.folder / "model")}
    result = train("dmd2", tmp_path, context, data=data, teacher=source)
    assert api.load(str(result.folder / "model"), context).image.picture == (3, 16, 16)


def test_a_judge_of_other_pictures_is_left_out_with_a_warning(png_folder, tmp_path, context, caplog):
    from distill_core.recipe import load_recipe

    data = {"name": "images", "path": str(png_folder), "size": 16}
    recipe = load_recipe("edm_digits").override(
        {"steps": 1, "batch_size": 4, "data": data, "network": NETWORK}
    )
    result = api.train(recipe.model_copy(update={"publish": None}), tmp_path / "run", context)
    assert result.figures == {}
    assert "no accuracy and none of its distances are measured" in caplog.text


def test_teacher_and_student_train_on_cifar_parquet(tmp_path, context):
    folder = SHARED_DATA / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = {"name": "huggingface", "path": str(folder), "split": "test", "limit": 64}
    teacher = train("edm_digits", tmp_path / "teacher", context, data=data, network=NETWORK)
    result = train("dmd2", tmp_path, context, data=data, teacher={"path": str(teacher.folder / "model")})
    assert api.load(str(result.folder / "model"), context).image.picture == (3, 32, 32)


def test_a_field_trains_from_a_blender_scene(tmp_path, context):
    folder = SHARED_DATA / "lego_200"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = {"name": "blender", "path": str(folder), "factor": 8, "max_test_views": 1}
    result = train("nerf_blender", tmp_path, context, data=data)
    assert result.figures["psnr"] > 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"name": "procedural_scene"}}, "no pictures to learn from; set data.name"),
        ({"network": {"name": "DiTTransformer2DModel", "args": {"patch_size": 3}}}, "do not suit pictures"),
        ({"network": {"name": "DiTTransformer2DModel", "args": {"num_layers": -1}}}, "do not suit pictures"),
        ({"config": {"sigma_min": 5.0, "sigma_max": 1.0}}, "sigma_min = 5 must be below sigma_max = 1"),
    ],
)
def test_what_a_network_cannot_learn_from_is_refused_in_a_sentence(changes, sentence, tmp_path, context):
    with pytest.raises(ConfigError, match=sentence):
        train("edm_digits", tmp_path, context, **changes)


def test_a_stop_reaches_a_teacher_that_is_trained_on_the_way(tmp_path, context):
    fresh = api.context(context.store, tmp_path / "cache")
    result = api.train(
        tiny_recipe("dmd2", teacher={"recipe": "edm_digits"}),
        tmp_path / "run",
        fresh,
        should_stop=lambda: True,
    )
    assert result.stopped
    assert not list((tmp_path / "cache").rglob("done"))


def test_a_classifier_is_refused_as_a_generators_teacher(tmp_path, context):
    judge = train("judge_digits", tmp_path / "judge", context).folder / "model"
    with pytest.raises(ArtifactError, match="the teacher must be a Denoiser, and this is a Classifier"):
        train("dmd2", tmp_path, context, teacher={"path": str(judge)})

"""Folders of transformers as teachers of kd: classes by name, pictures of any size, unmoved by training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core import api
from distill_core.building import build
from distill_core.errors import ConfigError, DistilleryError
from distill_core.kinds.loading import load_model
from distill_core.networks.predictor import load_predictor
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.helpers import tiny_recipe
from tests.unit.networks.test_vision_folders import NAMES, good, processor, theirs


def taught(folder: Path, tmp_path: Path, context, **changes: object):
    """A tiny kd of a teacher's folder on pictures of its three classes, in folders of other order."""
    for place, name in enumerate(("cow", "ant", "bee")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            picture = np.full((24, 32, 3), 40 * place + 9 * number, np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / name / f"{number}.png")
    data = {"name": "images", "path": str(tmp_path / "data")}
    recipe = tiny_recipe(
        "kd", **{"teacher.path": str(folder), "data": data, "evaluate": {"data": data}, **changes}
    )
    return recipe.override(
        {"network.name": "ResNetForImageClassification", "network.args": {"depths": [1, 1, 1]}}
    )


def test_a_folder_is_a_teacher_whose_classes_the_student_has_by_name(tmp_path, context):
    folder = good(tmp_path / "teacher")
    recipe = taught(folder, tmp_path, context)
    before = load_model(folder).state_dict()
    result = api.train(recipe, tmp_path / "run", context)
    student = load_predictor(result.folder / "model")
    assert student.card().class_names == NAMES
    assert {"accuracy", "teacher_accuracy"} <= result.figures.keys()
    method, _ = build(recipe, context)
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(before[name], value)
    assert not any(module.training for module in method.teacher.modules())


def test_a_teacher_with_batch_norm_is_not_moved_by_training(tmp_path, context):
    theirs("ResNetForImageClassification", tmp_path / "teacher")
    processor(tmp_path / "teacher", size={"height": 24, "width": 32})
    recipe = taught(tmp_path / "teacher", tmp_path, context)
    method, source = build(recipe, context)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    Trainer(method, source, recipe, Run(tmp_path / "run")).train()
    assert all(torch.equal(before[name], value) for name, value in method.teacher.state_dict().items())
    tracked = method.student.state_dict()[
        "network.model.resnet.embedder.embedder.normalization.num_batches_tracked"
    ]
    assert tracked == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "SegformerForSemanticSegmentation",
            "the teacher answers mask_logits to image, and a classifier answers",
        ),
        ("ViTMAEModel", "needs a classifier that names its classes as teacher"),
    ],
)
def test_a_teacher_that_is_no_classifier_is_refused(name, said, tmp_path, context):
    with pytest.raises(ConfigError, match=said):
        build(taught(good(tmp_path / "teacher", name), tmp_path, context), context)


def test_a_teacher_of_other_pictures_or_classes_is_refused(tmp_path, context):
    folder = good(tmp_path / "teacher")
    with pytest.raises(
        ConfigError, match=r"takes pictures float32 \(3, <=1024, <=1024\), and the data's are \(1, 8, 8\)"
    ):
        build(
            taught(folder, tmp_path, context, data={"name": "digits", "only": [0, 1, 2]}, evaluate={}),
            context,
        )
    (tmp_path / "data").mkdir(exist_ok=True)
    recipe = taught(folder, tmp_path, context)
    (tmp_path / "data" / "cow").rename(tmp_path / "data" / "dog")
    with pytest.raises(
        DistilleryError, match="the data has a class 'dog', and the teacher has no such class"
    ):
        build(recipe, context)

"""SKD: its loss, its off switch, figures by SNR, and students that are exported as they answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from distill_core import api
from distill_core.errors import ConfigError, DataError
from distill_core.networks.predictor import load_predictor
from distillery_converter.convert import convert
from tests.helpers import tiny_context, tiny_recipe, tiny_trainer
from tests.unit.data.test_classes import classifier

FRAMES = {"name": "modulations", "count": 48, "length": 32, "snr_low": -6, "snr_step": 12}
TEACHER = {"name": "clst", "args": {"widths": [8], "depths": [1], "strides": [4]}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a tiny ClST after three steps."""
    folder = tmp_path_factory.mktemp("clst")
    recipe = tiny_recipe("clst_modulations", steps=3, data=FRAMES, network=TEACHER, evaluate={})
    api.train(recipe, folder, tiny_context(folder))
    return folder / "model"


def changes(teacher, **more):
    return {"teacher": {"path": str(teacher)}, "data": FRAMES, "evaluate": {}, **more}


def test_the_loss_is_cross_entropy_and_divergence_by_their_weights(teacher, context, tmp_path):
    method = tiny_trainer("skd", context, tmp_path, **changes(teacher, **{"config.weight": 0.7})).method
    frames, labels = torch.randn(5, 2, 32), torch.tensor([0, 3, 1, 7, 2])
    logits = torch.randn(5, 8)
    taught = method.teacher.call("predict", {"iq": frames})["logits"]
    soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(taught / 4, 1), reduction="batchmean")
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 16 * soft
    torch.testing.assert_close(method.loss(logits, frames, labels), expected)


def test_without_weight_a_step_is_that_of_supervised_training_to_the_bit(teacher, context, tmp_path):
    network = {"name": "signal_cnn", "args": {"widths": [4, 6]}}
    optim = {"lr": 4e-3, "weight_decay": 0.01, "warmup_steps": 50, "decay": "cosine"}
    off = changes(teacher, network=network, steps=2, **{"config.weight": 0.0, "optim.student": optim})
    alone = {"network": network, "data": FRAMES, "evaluate": {}, "steps": 2, "optim.classifier": optim}
    alone["optim.classifier"] |= {"grad_clip": None}
    trainers = (
        tiny_trainer("skd", context, tmp_path / "off", **off),
        tiny_trainer("clst_modulations", context, tmp_path / "alone", **alone),
    )
    weights = []
    for trainer in trainers:
        trainer.train_step()
        weights.append(trainer.method.main.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_run_is_measured_by_snr_and_its_range_beside_its_teacher(teacher, context, tmp_path):
    table = {
        "data": {**FRAMES, "split": "test"},
        "by": "snr",
        "ranges": {"clear": {"column": "snr", "low": 0, "high": 7}},
    }
    found = api.train(tiny_recipe("skd", **changes(teacher, evaluate=table)), tmp_path, context).figures
    values = ("snr_-6_accuracy", "snr_6_accuracy", "snr_18_accuracy")
    assert found["accuracy"] == pytest.approx(sum(found[name] for name in values) / 3)
    assert found["clear_accuracy"] == found["snr_6_accuracy"]
    assert {f"teacher_{name}" for name in values} <= found.keys()
    assert (tmp_path / "charts" / "accuracy_by_snr.png").is_file()
    assert (tmp_path / "model" / "preview.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["signal_mobilenet", "clst"])
def test_a_student_is_exported_as_it_answers(student, teacher, tmp_path):
    context = tiny_context(tmp_path)
    network = TEACHER if student == "clst" else {"name": student, "args": {"widths": [4, 6]}}
    recipe = tiny_recipe("skd", **changes(teacher, network=network))
    api.train(recipe.override({"publish.name": "radio"}), tmp_path / "run", context)
    report = convert(context.store, "radio@1", "onnx-fp32").exports["onnx-fp32"].graphs["predict"]
    assert report.agreement == 1
    model = load_predictor(context.store.fetch("radio@latest"))
    assert list(model.card().functions["predict"].inputs) == ["iq"]


def test_a_teacher_of_other_frames_and_one_of_pictures_are_refused(teacher, context, tmp_path):
    with pytest.raises(
        ConfigError, match=r"the teacher takes items of iq float32 \(2, 32\), and the data's are"
    ):
        tiny_trainer("skd", context, tmp_path, **changes(teacher, data={**FRAMES, "length": 64}))
    classifier(*load_predictor(teacher).card().class_names).save(tmp_path / "pictures")
    with pytest.raises(
        ConfigError, match="the teacher answers logits to image, and a classifier answers logits"
    ):
        tiny_trainer("skd", context, tmp_path, **changes(tmp_path / "pictures"))


def test_frames_with_nan_are_refused_before_training_and_by_the_model_s_signature(teacher, context, tmp_path):
    frames = np.zeros((8, 2, 32), np.float32)
    frames[5, 1, 7] = np.nan
    path = tmp_path / "frames.safetensors"
    save_file({"iq": frames, "class_label": np.arange(8)}, path)
    function = load_predictor(teacher).card().functions["predict"]
    with pytest.raises(ConfigError, match="iq holds NaN or infinity"):
        function.checked({"iq": frames})
    names = list(load_predictor(teacher).card().class_names)
    data = {"name": "signals", "path": str(path), "class_names": names}
    with pytest.raises(DataError, match="iq of frame 5 holds NaN or infinity; repair or remove it"):
        tiny_trainer("skd", context, tmp_path, **changes(teacher, data=data))

"""KD: its loss against the formula, what the teacher changes, and that the off switch is plain training."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.methods.recognition.kd import KD, Config, soft_cross_entropy
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import tiny_trainer
from tests.unit.data.test_classes import classifier, folder, taught


def test_the_soft_loss_is_the_divergence_written_out():
    student = torch.tensor([[0.3, -1.1, 2.4], [1.7, 0.2, -0.6]], dtype=torch.float64)
    teacher = torch.tensor([[1.9, 0.4, -0.7], [-0.8, 1.3, 0.9]], dtype=torch.float64)
    temperature, total = 3.0, 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist()):
        p, q = ([math.exp(v / temperature) for v in z] for z in (z_t, z_s))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    expected = temperature**2 * total / 2
    assert float(soft_cross_entropy(student, teacher, temperature)) == pytest.approx(expected, rel=1e-12)
    assert float(soft_cross_entropy(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", ["dkd", "dist"])
def test_another_loss_takes_the_place_of_the_divergence_and_the_labels_keep_theirs(loss, context, tmp_path):
    losses = {}
    for name, changes in {
        "kd": {},
        "spelt out": {"config.loss": "kd"},
        loss: {"config.loss": loss},
        "labels": {"config.loss": loss, "config.weight": 0.0},
        "labels, kd": {"config.weight": 0.0},
    }.items():
        trainer = tiny_trainer("kd", context, tmp_path / name, **changes)
        losses[name] = float(trainer.train_step()["student_loss"])
    assert losses["kd"] == losses["spelt out"] != losses[loss]
    assert losses["labels"] == losses["labels, kd"] != losses[loss]


def test_a_weight_of_another_loss_is_refused():
    for given in (
        {"others_weight": 2},
        {"loss": "dist", "label_weight": 0.3},
        {"loss": "dkd", "class_weight": 2},
    ):
        with pytest.raises(ConfigError, match=r"is of loss = '\w+', and loss is"):
            Config.parse(given)
    assert Config.parse(Config(loss="dkd", others_weight=2).model_dump()).others_weight == 2


def test_without_weight_the_teacher_is_not_asked(context, tmp_path):
    trainer = tiny_trainer("kd", context, tmp_path, **{"config.weight": 0.0})
    trainer.method.teacher.call = None  # asking it would be an error
    values = trainer.train_step()
    assert torch.isfinite(values["student_loss"])


def test_teacher_and_student_see_the_same_view_and_the_teacher_stays(context, tmp_path):
    trainer = tiny_trainer("kd", context, tmp_path, **{"data.view": {"shift": 2}})
    seen, ask = [], trainer.method.teacher.call
    trainer.method.teacher.call = lambda name, inputs: seen.append(inputs["image"]) or ask(name, inputs)
    trainer.method.student.network.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    before = {name: value.clone() for name, value in trainer.method.teacher.state_dict().items()}
    trainer.train_step()
    assert torch.equal(seen[0], seen[1])
    for name, value in trainer.method.teacher.state_dict().items():
        assert torch.equal(before[name], value), name


def test_a_teacher_of_other_classes_is_refused_and_named(context, tmp_path):
    with pytest.raises(
        ConfigError, match="the data has a class 'red circle', and the classes of the teacher"
    ):
        tiny_trainer("kd", context, tmp_path, **{"data": {"name": "shapes"}})


def test_labels_are_the_teacher_s_numbers_of_the_same_classes_and_so_are_the_student_s(tmp_path):
    data = build_source(folder(tmp_path, "cat", "fox"))
    teacher = classifier("fox", "dog", "cat")
    network = NetworkConfig(name="classifier", args={"width": 8})
    method = KD(Config(), teacher=teacher, network=network, data=data)
    assert taught(data) == {2: {"cat"}, 0: {"fox"}}
    assert method.main.card().class_names == ("fox", "dog", "cat")
    assert method.student(data.all().x0).shape == (8, 3)

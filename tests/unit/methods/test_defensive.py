"""Defensive distillation: both trainings at the temperature, deployment without it, and budgets that are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.errors import ConfigError
from distill_core.methods.recognition.defensive import Config
from tests.helpers import entered, tiny_trainer


def losses(trainer, step):
    method, batch = entered(trainer.method, step), trainer.batches.of(step, trainer.draw())[0]
    return batch, next(method.updates(batch, step))


def test_the_teacher_learns_at_the_temperature_and_the_student_its_answers_at_the_same(context, tmp_path):
    trainer = tiny_trainer("defensive", context, tmp_path, **{"config.temperature": 7.0})
    method = trainer.method
    batch, first = losses(trainer, 0)
    labels = batch.columns["class_label"]
    assert first.role == "teacher"
    torch.testing.assert_close(first.loss, F.cross_entropy(method.teacher(batch.x0) / 7, labels))
    batch, second = losses(trainer, 1)
    target = F.softmax(method.teacher(batch.x0) / 7, 1)
    assert second.role == "student"
    torch.testing.assert_close(second.loss, F.cross_entropy(method.student(batch.x0) / 7, target))


def test_what_is_published_answers_without_the_temperature(context, tmp_path):
    method = tiny_trainer("defensive", context, tmp_path, **{"config.temperature": 7.0}).method
    x0 = torch.rand(3, 1, 8, 8) * 2 - 1
    assert torch.equal(method.main.call("predict", {"image": x0})["logits"], method.student.network(x0))
    assert list(method.published()) == ["student"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": 0.0}, "config.temperature"),
        ({"attacks": {"epsilon": 0.0}}, "config.attacks.epsilon"),
        ({"attacks": {"cw_steps": 0}}, "config.attacks.cw_steps"),
    ],
)
def test_no_temperature_and_no_budget_are_refused_by_name(values, field):
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")) as error:
        Config.parse(values, where="config")
    assert error.value.field == field

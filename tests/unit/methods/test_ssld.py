"""SSLD: no label enters it, the surest of each class are chosen, and the second stage sees the task alone."""

from __future__ import annotations

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.methods.recognition.ssld import answers, surest_of_each_class
from tests.helpers import tiny_trainer


def test_of_each_predicted_class_the_surest_are_chosen():
    logits = torch.tensor([[3.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0.7], [0, 0, 4], [0, 0, 5]])
    assert surest_of_each_class(logits, 2).tolist() == [0, 2, 4, 5]
    assert surest_of_each_class(logits, 1).tolist() == [0, 5]
    assert surest_of_each_class(logits, 9).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_chosen_pictures_are_those_that_the_teacher_names_most_surely(context, tmp_path):
    trainer = tiny_trainer("ssld", context, tmp_path, **{"config.top_k": 3})
    method = trainer.method
    logits = answers(method.teacher, trainer.source)  # the same digits, with labels
    chosen = surest_of_each_class(logits, 3)
    assert len(logits.argmax(1).unique()) < len(chosen) < 31
    whole = trainer.source.all().x0
    assert torch.equal(method.unlabelled.all().x0, whole[chosen])
    assert method.figures(None) == {"unlabelled_items": len(whole), "chosen_items": len(chosen)}


def test_labels_change_nothing(context, tmp_path):
    plain = tiny_trainer("ssld", context, tmp_path / "a", steps=3)
    data = {**plain.recipe.data, "label_noise": 0.9, "order": {"kind": "static", "share": 0.07}}
    without = {**data, "labelled": False, "label_noise": 0.0}
    runs = [
        tiny_trainer("ssld", context, tmp_path / f"{n}", steps=3, data=d)
        for n, d in enumerate((data, without))
    ]
    for trainer in runs:
        trainer.train()
    noisy, unlabelled = (trainer.method.student.state_dict() for trainer in runs)
    assert all(torch.equal(noisy[name], unlabelled[name]) for name in noisy)


def test_the_first_stage_sees_both_sets_and_the_second_the_task_alone_at_its_own_rate(context, tmp_path):
    trainer = tiny_trainer("ssld", context, tmp_path, steps=4, **{"config.distil_steps": 2})
    seen = []
    trainer.method.student.network.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    rates = []
    for _ in range(4):
        trainer.enter_next()
        trainer.train_step()
        rates.append(trainer.optimizers["student"].param_groups[0]["lr"])
        trainer.step += 1
    assert seen == [16, 16, 8, 8]
    assert rates[2] == 2e-5


def test_without_unlabelled_pictures_there_is_no_second_batch(context, tmp_path):
    trainer = tiny_trainer("ssld", context, tmp_path, **{"config.top_k": 0})
    seen = []
    trainer.method.student.network.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    trainer.train_step()
    assert seen == [8]
    assert trainer.method.figures(None)["chosen_items"] == 0


def test_pictures_of_another_shape_are_refused_by_the_table_that_names_them(context, tmp_path):
    with pytest.raises(ConfigError, match="the unlabelled pictures are") as error:
        tiny_trainer("ssld", context, tmp_path, **{"data.unlabelled": {"name": "shapes"}})
    assert error.value.field == "data.unlabelled"

"""DMAE: the same patches for both, a teacher that stops, and a step without it that is painting alone."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.methods.recognition.dmae import direction_distance
from tests.helpers import tiny_trainer

PRETRAINING = {"steps": 400, "config.pretrain_steps": 200}

RESNET = {"network.name": "ResNetForImageClassification", "network.args": {}}


def pretrained(trainer) -> dict[str, torch.Tensor]:
    trainer.step = 100  # past the warmup's first step, whose rate is 0
    return trainer.train_step()


def test_the_distance_is_between_directions():
    own = torch.tensor([[[3.0, 4.0], [0.0, -0.7]]])
    other = torch.tensor([[[5.0, 0.0], [0.0, 2.2]]])
    expected = (abs(0.6 - 1) + 0.8 + 0 + 2) / 4
    assert float(direction_distance(own, other)) == pytest.approx(expected, rel=1e-6)
    assert float(direction_distance(7 * own, other)) == pytest.approx(expected, rel=1e-6)


def test_teacher_and_student_see_the_same_patches_and_the_teacher_stops_below_its_last_block(
    context, tmp_path
):
    trainer = tiny_trainer("dmae", context, tmp_path, **PRETRAINING)
    method, run, seen = trainer.method, [], []
    for number, layer in enumerate(method.taught.base.layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    for encoder in (method.encoder, method.taught):
        select = encoder.entering
        encoder.entering = lambda x, mask, select=select: (seen.append((x, mask)), select(x, mask))[1]
    method.teacher.network.model.decoder.register_forward_hook(lambda *_: run.append("decoder"))
    pretrained(trainer)
    assert run == [0, 1, 2]
    assert seen[0][0] is seen[1][0]
    assert seen[0][1] is seen[1][1]


def test_a_step_moves_decoder_and_projection_and_the_published_student_has_neither(context, tmp_path):
    trainer = tiny_trainer("dmae", context, tmp_path, **PRETRAINING)
    exits = trainer.method.student.exits
    before = {name: value.clone() for name, value in exits.named_parameters() if value.requires_grad}
    pretrained(trainer)
    after = dict(exits.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    published = trainer.method.published()["student"]
    assert not any("decoder" in name or "exits" in name for name, _ in published.named_parameters())


def test_the_labels_train_the_last_layer_alone_or_all_of_the_student(context, tmp_path):
    for head_only, count in ((True, 2), (False, 10)):
        trainer = tiny_trainer(
            "dmae",
            context,
            tmp_path / str(head_only),
            steps=400,
            **{"config.pretrain_steps": 0, "config.head_only": head_only},
        )
        before = {name: value.clone() for name, value in trainer.method.student.named_parameters()}
        pretrained(trainer)
        moved = [n for n, v in trainer.method.student.named_parameters() if not torch.equal(before[n], v)]
        assert all(("classifier" in name) if head_only else name.startswith("predictor.") for name in moved)
        assert len(moved) == count if head_only else len(moved) > count


def test_without_its_weight_the_teacher_is_not_asked_and_the_step_is_painting_alone(context, tmp_path):
    changes = {**PRETRAINING, "seed": 4}
    off = tiny_trainer("dmae", context, tmp_path / "off", **changes, **{"config.weight": 0.0})
    on = tiny_trainer("dmae", context, tmp_path / "on", **changes)
    for layer in off.method.taught.base.layers:
        layer.register_forward_hook(lambda *_: pytest.fail("the teacher was run"))
    without, beside = pretrained(off), pretrained(on)
    assert torch.equal(without["student_loss"], without["pixel_loss"])
    assert torch.equal(without["pixel_loss"], beside["pixel_loss"])
    assert "feature_loss" not in without
    assert float(beside["student_loss"]) > float(beside["pixel_loss"])


def test_what_the_teacher_costs_is_counted(context, tmp_path):
    figures = tiny_trainer("dmae", context, tmp_path).method.figures(None)
    assert figures["teacher_share_of_blocks"] == 0.75
    assert figures["teacher_share_of_masked_operations"] == pytest.approx(0.75, rel=0.1)
    assert math.isclose(
        figures["teacher_share_of_operations"], 0.75 * 5 / 17, rel_tol=0.25
    )  # of 17 tokens 5 are seen


@pytest.mark.parametrize(
    ("changes", "said", "field"),
    [
        ({"network.args": {"patch_size": 4}}, "into 4 patches and the teacher into 16", "teacher"),
        (RESNET, "the student is a ResNet", "network.name"),
        ({"teacher": {"recipe": "judge_digits"}}, "the teacher is a Classifier", "teacher"),
        ({"data.unlabelled": {"name": "shapes"}}, "the unlabelled pictures are", "data.unlabelled"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_trained(context, tmp_path, changes, said, field):
    with pytest.raises(ConfigError, match=said) as error:
        tiny_trainer("dmae", context, tmp_path, **changes)
    assert error.value.field == field

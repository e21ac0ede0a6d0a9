"""Quantised students: what is trained, what is published, and that full precision is plain distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core import api
from distill_core.errors import ConfigError
from distill_core.kinds.loading import load_model
from distill_core.methods.recognition.differentiable_quantization import quantile_points
from tests.helpers import tiny_recipe, tiny_trainer


def test_the_loss_is_taken_at_the_rounded_weights_and_the_weights_before_rounding_move(context, tmp_path):
    trainer = tiny_trainer("quantized", context, tmp_path)
    method, batch = trainer.method, trainer.batches.of(0, trainer.draw())[0]
    labels = batch.columns["class_label"]
    with torch.no_grad():
        rounded = method.baked().network(batch.x0)
        taught = method.teacher.call("predict", {"image": batch.x0})["logits"]
    log_p, log_q = F.log_softmax(taught / 2, 1), F.log_softmax(rounded / 2, 1)
    soft = 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    expected = 0.7 * soft + 0.3 * F.cross_entropy(rounded, labels)
    trainer.step = 10  # past the first step, whose rate is 0
    before = method.student.network.last.weight.detach().clone()
    batches, trainer.batches.of = [batch], lambda *_: batches
    assert float(trainer.train_step()["student_loss"]) == pytest.approx(float(expected), rel=1e-5)
    moved = method.student.network.last.weight.detach() - before
    assert 0 < moved.abs().max() < 0.01
    assert len(method.student.network.last.weight.unique()) > 100


def test_what_is_published_has_four_values_in_each_bucket(context, tmp_path):
    result = api.train(tiny_recipe("quantized", **{"config.bucket": 64}), tmp_path, context)
    weight = load_model(tmp_path / "model").network.last.weight.flatten()
    assert all(len(part.unique()) <= 4 for part in weight.split(64))
    assert 3 < result.figures["bits_per_weight"] < 3.5  # 2 + 64 / 64, and the points
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < result.figures["weight_bytes"] + 8000


def test_at_0_bits_and_in_full_precision_the_training_is_that_of_distillation(context, tmp_path):
    runs = [
        tiny_trainer("quantized", context, tmp_path / "a", **{"config.bits": 0}),
        tiny_trainer("quantized", context, tmp_path / "b", **{"config.straight_through": False}),
        tiny_trainer("kd", context, tmp_path / "c", **{"config.weight": 0.7, "config.temperature": 2.0,
                     "data": {"name": "digits", "split": "train"}, "optim": {"student": {"lr": 2e-3, "warmup_steps": 20,
                     "decay": "cosine"}}}),
    ]  # fmt: skip
    for _ in range(3):
        losses = [float(trainer.train_step()["student_loss"]) for trainer in runs]
        assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)
        for trainer in runs:
            trainer.step += 1
    assert runs[0].method.main.described.packing is None
    assert runs[1].method.main.described.packing.bits == 2


def test_quantiles_stand_for_equally_many_values():
    values = torch.arange(80.0).pow(2)[torch.randperm(80, generator=torch.Generator().manual_seed(1))]
    points = quantile_points(values, 2)
    assert points.tolist() == [float(round(79 * (k + 0.5) / 4)) ** 2 for k in range(4)]


def test_only_the_points_are_trained_and_the_weights_stay(context, tmp_path):
    trainer = tiny_trainer("differentiable_quantization", context, tmp_path, **{"optim.student.lr": 1e-3})
    student = trainer.method.student
    weights = {name: value.detach().clone() for name, value in student.predictor.named_parameters()}
    points = [value.detach().clone() for value in student.points]
    trainer.train_step()
    assert all(torch.equal(weights[name], value) for name, value in student.predictor.named_parameters())
    assert all(not torch.equal(a, b) for a, b in zip(points, student.points))
    teacher = dict(trainer.method.teacher.named_parameters())
    own = dict(student.predictor.network.named_parameters())
    assert all(torch.equal(teacher[name], own[name]) for name in teacher)


def test_points_that_cross_are_sorted_before_weights_look_for_the_nearest(context, tmp_path):
    student = tiny_trainer("differentiable_quantization", context, tmp_path).method.student
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = student(x)
        student.points[0].copy_(student.points[0].flip(0))
        assert torch.equal(student(x), expected)
    assert torch.equal(student.baked()(x), student(x))


def test_no_bits_leave_no_points(context, tmp_path):
    with pytest.raises(ConfigError, match="leaves no point to learn") as error:
        tiny_trainer("differentiable_quantization", context, tmp_path, **{"config.bits": 0})
    assert error.value.field == "config.bits"

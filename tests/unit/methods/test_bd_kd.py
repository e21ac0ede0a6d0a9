"""BD-KD: its weights by item written out, both losses of the same weights, and d = 1 is the symmetric loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core import api
from distill_core.errors import ConfigError
from distill_core.losses.distillation import kl, reverse_kl, symmetric_kl
from distill_core.methods.recognition.bd_kd import balanced_loss
from tests.helpers import tiny_recipe, tiny_trainer

SURE, UNSURE = [4.0, -1.0, 0.5], [0.4, 0.1, -0.2]
STUDENT, PEER = torch.tensor([SURE, UNSURE]), torch.tensor([UNSURE, SURE])


def test_where_the_student_is_less_sure_the_reverse_divergence_counts_more():
    forward, back = kl(STUDENT, PEER, 3.0), reverse_kl(STUDENT, PEER, 3.0)
    found = balanced_loss(STUDENT, PEER, 3.0, 2.5)
    assert float(found[0]) == pytest.approx(float(2.5 * forward[0] + back[0]))
    assert float(found[1]) == pytest.approx(float(forward[1] + 2.5 * back[1]))
    assert abs(float(forward[0] - back[0])) > 0.05, "equal divergences would hide a mistake"


def test_equal_weights_are_the_symmetric_loss_exactly():
    torch.manual_seed(1)
    student, peer = torch.randn(2, 9, 5)
    assert torch.equal(balanced_loss(student, peer, 3.0, 1.0), 2 * symmetric_kl(student, peer, 3.0))


def test_the_gradient_reaches_neither_the_peer_nor_the_weights():
    student, peer = STUDENT.clone().requires_grad_(), PEER.clone().requires_grad_()
    balanced_loss(student, peer, 3.0, 2.0).sum().backward()
    assert peer.grad is None
    fixed = STUDENT.clone().requires_grad_()
    terms = kl(fixed, PEER, 3.0) * torch.tensor([2.0, 1.0]) + reverse_kl(fixed, PEER, 3.0) * torch.tensor(
        [1.0, 2.0]
    )
    terms.sum().backward()
    torch.testing.assert_close(student.grad, fixed.grad)


def test_both_losses_are_of_the_weights_before_either_is_stepped(context, tmp_path):
    trainer = tiny_trainer("bd_kd", context, tmp_path)
    method, batch = trainer.method, trainer.batches.of(0, trainer.draw())[0]
    with torch.no_grad():
        student, peer = method.student(batch.x0), method.peer(batch.x0)
        own, others = method.losses(student, peer)
        labels = batch.columns["class_label"]
        expected = F.cross_entropy(student, labels) + own, F.cross_entropy(peer, labels) + others
    values = trainer.train_step()
    assert float(values["student_loss"]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert float(values["peer_loss"]) == pytest.approx(float(expected[1]), rel=1e-5)


def test_without_weight_each_learns_from_the_labels_alone(context, tmp_path):
    trainer = tiny_trainer("bd_kd", context, tmp_path, **{"config.weight": 0.0})
    batch = trainer.batches.of(0, trainer.draw())[0]
    expected = F.cross_entropy(trainer.method.student(batch.x0), batch.columns["class_label"])
    assert torch.equal(trainer.train_step()["student_loss"], expected.detach())


def test_both_are_published_and_measured(context, tmp_path):
    recipe = tiny_recipe("bd_kd", **{"evaluate.data": {"name": "digits", "split": "test"}})
    recipe = recipe.override({"publish": {"name": "pair"}})
    result = api.train(recipe, tmp_path / "run", context)
    assert result.manifest.name == "pair"
    peer = context.store.manifest("pair-peer@latest")
    assert peer.card["parameters"] > result.manifest.card["parameters"] > 0
    assert {"accuracy", "peer_accuracy", "calibration_error"} <= result.figures.keys()


def test_a_peer_that_no_network_is_called_is_named(context, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'classifier'") as error:
        tiny_trainer("bd_kd", context, tmp_path, **{"config.peer": {"name": "classifer"}})
    assert error.value.field == "config.peer.name"

"""PS-KD: its targets written out, the memory by item, and that alpha = 0 is training on the labels, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.methods.recognition._memory import PredictionMemory
from distill_core.methods.recognition._schedules import Epochs
from distill_core.methods.recognition.ps_kd import progressive_loss
from tests.helpers import tiny_trainer

LOGITS = torch.tensor([[0.3, -1.1, 2.4], [1.7, 0.2, -0.6]], dtype=torch.float64)
LABELS = torch.tensor([1, 0])
REMEMBERED = torch.tensor([[0.2, 0.1, 0.7], [0.5, 0.3, 0.2]], dtype=torch.float64)


def test_the_loss_is_the_cross_entropy_with_the_mixed_targets_written_out():
    alpha, total = 0.3, 0.0
    for z, y, m in zip(LOGITS.tolist(), LABELS.tolist(), REMEMBERED.tolist()):
        log_sum = math.log(sum(map(math.exp, z)))
        target = [(1 - alpha) * (c == y) + alpha * m[c] for c in range(3)]
        total -= sum(q * (z[c] - log_sum) for c, q in enumerate(target))
    assert float(progressive_loss(LOGITS, LABELS, REMEMBERED, alpha)) == pytest.approx(total / 2, rel=1e-12)


def test_the_weight_grows_by_epoch_to_its_last_value():
    epochs = Epochs(items=10, batch_size=4, steps=15)  # six epochs of 2.5 steps
    assert epochs.count == 6
    assert [epochs.of(step) for step in (0, 2, 3, 5, 14)] == [0, 0, 1, 2, 5]
    assert epochs.weight(0.8, 0) == pytest.approx(0.8 / 6)
    assert epochs.weight(0.8, 14) == pytest.approx(0.8)
    assert epochs.weight(0.8, 0, "constant") == 0.8
    assert Epochs(items=10, batch_size=5, steps=4).of(3) == 1


def test_the_target_of_an_item_is_what_was_said_of_it_the_last_time(context, tmp_path):
    trainer = tiny_trainer("ps_kd", context, tmp_path)
    method = trainer.method
    batch = trainer.batches.of(0, trainer.draw())[0]
    untouched = next(i for i in range(method.memory.store.origin.size) if i not in batch.index.tolist())
    first = torch.nn.functional.one_hot(batch.columns["class_label"], 10).float()
    assert torch.equal(method.memory.at(batch.index), first)
    with torch.no_grad():
        said = method.student(batch.x0).softmax(1)
    trainer.train_step()
    assert torch.equal(method.memory.at(batch.index), said)
    assert set(method.memory.at(torch.tensor([untouched])).unique().tolist()) == {0.0, 1.0}


def test_without_alpha_every_step_is_that_of_training_on_the_labels_bit_for_bit(context, tmp_path):
    own = tiny_trainer("ps_kd", context, tmp_path / "a", **{"config.alpha": 0.0})
    data = {"name": "digits", "split": "train", "label_noise": 0.2, "order": own.recipe.data["order"]}
    args = {"width": 16, "num_features": 32}
    plain = tiny_trainer(
        "kd",
        context,
        tmp_path / "b",
        **{"config.weight": 0.0, "data": data, "network.args": args, "optim": own.recipe.optim["student"] and
           {"student": own.recipe.optim["student"].model_dump(exclude_none=True)}},
    )  # fmt: skip
    for _ in range(3):
        values = own.train_step(), plain.train_step()
        assert torch.equal(values[0]["student_loss"], values[1]["student_loss"])
        own.step, plain.step = own.step + 1, plain.step + 1
    for name, value in own.method.student.state_dict().items():
        assert torch.equal(value, plain.method.student.state_dict()[name]), name


def test_the_memory_is_part_of_a_checkpoint(context, tmp_path):
    trainer = tiny_trainer("ps_kd", context, tmp_path)
    trainer.train_step()
    kept = {name: value.clone() for name, value in trainer.method.state().items()}
    other = PredictionMemory(trainer.source)
    assert not torch.equal(other.state()["memory"], kept["memory"])
    other.load_state(kept)
    assert torch.equal(other.at(torch.arange(50)), kept["memory"][:50])

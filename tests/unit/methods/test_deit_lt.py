"""DeiT-LT: the loss before and after its switch written out, its weights and mixtures, and what it needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.data import build_source
from distill_core.errors import ConfigError, DataError
from distill_core.methods.pretrain.classifier import moved_uphill
from distill_core.methods.recognition._mixing import mixed_batch, pasted, random_box
from distill_core.methods.recognition.deit_lt import effective_number_weights
from tests.helpers import tiny_trainer

OFF = {"config.mixup": 0.0, "config.cutmix": 0.0}


def stepped(trainer, step):
    """The loss that the loop logs of `step`, its batch, and the logits of both heads and of the teacher before it."""
    trainer.step = step
    method, batch = trainer.method, trainer.batches.of(step, trainer.draw())[0]
    with torch.no_grad():
        heads = method.heads(batch.x0)
        wanted = method.teacher.call("predict", {"image": batch.x0})["logits"].argmax(1)
    loss = float(next(method.updates(batch, step)).loss.detach())
    return loss, batch.columns["class_label"], heads, wanted


def test_weights_are_inverse_to_the_effective_number_and_sum_to_the_classes():
    counts = torch.tensor([100.0, 20.0, 5.0])
    weights = effective_number_weights(counts, 0.99)
    raw = [0.01 / (1 - 0.99**n) for n in (100, 20, 5)]
    assert weights.tolist() == pytest.approx([3 * w / sum(raw) for w in raw], rel=1e-5)
    assert effective_number_weights(counts, 0.0).tolist() == [1, 1, 1]


def test_before_the_switch_both_tokens_count_half_and_no_class_counts_more(context, tmp_path):
    trainer = tiny_trainer("deit_lt", context, tmp_path, steps=50, **OFF)
    loss, labels, (by_class, by_teacher), wanted = stepped(trainer, 45)
    expected = (
        F.cross_entropy(by_class, labels, label_smoothing=0.1) + F.cross_entropy(by_teacher, wanted)
    ) / 2
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_after_it_the_distillation_token_alone_is_weighted_by_the_teacher_s_class(context, tmp_path):
    changes = {"data.imbalance": 30, "config.switch": 0.9}
    trainer = tiny_trainer("deit_lt", context, tmp_path, steps=50, **changes)
    loss, labels, (by_class, by_teacher), wanted = stepped(trainer, 45)
    weights = effective_number_weights(torch.bincount(trainer.source.labels).float(), 0.9999)
    assert weights[9] > 20 * weights[0]
    items = F.cross_entropy(by_teacher, wanted, reduction="none") * weights[wanted]
    assert loss == pytest.approx(float(F.cross_entropy(by_class, labels) + items.mean()) / 2, rel=1e-5)


def test_teacher_and_student_see_the_same_mixed_pictures(context, tmp_path):
    for sees, same in (("mixed", True), ("clean", False)):
        trainer = tiny_trainer("deit_lt", context, tmp_path / sees, **{"config.teacher_sees": sees})
        seen, ask, heads = [], trainer.method.teacher.call, trainer.method.heads
        trainer.method.teacher.call = lambda name, given: seen.append(given["image"]) or ask(name, given)  # noqa: B023
        trainer.method.heads = lambda x0: seen.append(x0) or heads(x0)  # noqa: B023
        trainer.train_step()
        assert torch.equal(seen[0], seen[1]) is same


def test_the_answer_is_the_mean_of_both_heads_and_each_is_measured_alone(context, tmp_path):
    method = tiny_trainer("deit_lt", context, tmp_path).method
    x0 = torch.rand(3, 1, 8, 8) * 2 - 1
    method.eval()
    first, second = (method.references()[name].call("predict", {"image": x0})["logits"] for name in
                     ("class_token", "distillation_token"))  # fmt: skip
    assert not torch.allclose(first, second)
    torch.testing.assert_close(method.student(x0), (first + second) / 2)


def test_mixtures_keep_the_share_of_the_area_in_the_labels():
    torch.manual_seed(0)
    x0, other = torch.zeros(2, 1, 7, 11), torch.ones(2, 1, 7, 11)
    for _ in range(20):
        mixed, share = pasted(x0, other, random_box(7, 11, float(torch.rand(()))))
        assert float(1 - mixed[0].mean()) == pytest.approx(share, abs=1e-6)
    x0, target = torch.stack([torch.zeros(1, 7, 11), torch.ones(1, 7, 11)]), torch.eye(2)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        for _ in range(5):
            mixed, labels = mixed_batch(x0, target, mixup, cutmix)
            torch.testing.assert_close(labels[:, 1], mixed.mean((1, 2, 3)))
    assert mixed_batch(x0, target, 0.0, 0.0)[0] is x0


def test_sharpness_is_felt_at_the_top_of_a_step_uphill():
    w = torch.tensor([3.0, -4.0], requires_grad=True)
    curvature = torch.tensor([1.0, 5.0])
    loss = lambda v: (curvature * v["w"] ** 2).sum() / 2  # noqa: E731
    moved = moved_uphill(loss({"w": w}), {"w": w}, 0.1)
    gradient = curvature * w.detach()
    torch.testing.assert_close(moved["w"].detach(), w.detach() + 0.1 * gradient / gradient.norm())
    loss(moved).backward()
    torch.testing.assert_close(w.grad, curvature * moved["w"].detach())


def test_a_balanced_teacher_adds_the_logarithm_of_its_classes_to_the_logits(context, tmp_path):
    trainer = tiny_trainer("judge_digits_tail", context, tmp_path)
    counts = torch.bincount(trainer.source.labels).float()
    logits, labels = torch.randn(6, 10), torch.arange(6)
    expected = F.cross_entropy(logits + counts.log(), labels)
    assert float(trainer.method.loss(logits, labels)) == pytest.approx(float(expected), rel=1e-6)
    assert trainer.method.held_out.size == build_source({"name": "digits", "split": "test"}).size


def test_a_network_without_a_distillation_token_is_refused(context, tmp_path):
    with pytest.raises(ConfigError, match="DeiTForImageClassificationWithTeacher") as error:
        tiny_trainer("deit_lt", context, tmp_path, network={"name": "classifier", "args": {}})
    assert error.value.field == "network.name"


def test_a_class_without_a_single_item_is_named(context, tmp_path):
    with pytest.raises(DataError, match="class '1' has not a single item"):
        tiny_trainer("deit_lt", context, tmp_path, **{"data.imbalance": 1, "data.only": [0, 5]})

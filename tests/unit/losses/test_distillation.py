"""Losses between predictions against their sums written out, their limits, and each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from distill_core.losses.distillation import (
    DIVERGENCES,
    class_of,
    dist,
    dkd,
    entropy,
    hard_ce,
    js,
    kl,
    reduced,
    reverse_kl,
    soft_ce,
    symmetric_kl,
)

STUDENT = torch.tensor([[0.3, -1.1, 2.4], [1.7, 0.2, -0.6]], dtype=torch.float64)
TEACHER = torch.tensor([[1.9, 0.4, -0.7], [-0.8, 1.3, 0.9]], dtype=torch.float64)
T = 3.0


def probabilities(logits, temperature=T):
    rows = [[math.exp(z / temperature) for z in row] for row in logits.tolist()]
    return [[p / sum(row) for p in row] for row in rows]


def written_out(a, b):
    return [T**2 * sum(p * math.log(p / q) for p, q in zip(x, y)) for x, y in zip(a, b)]


def test_divergences_are_the_sums_over_classes_written_out_each_item_by_itself():
    p_s, p_t = probabilities(STUDENT), probabilities(TEACHER)
    middle = [[(a + b) / 2 for a, b in zip(x, y)] for x, y in zip(p_s, p_t)]
    forward, back = written_out(p_t, p_s), written_out(p_s, p_t)
    half = [(a + b) / 2 for a, b in zip(written_out(p_t, middle), written_out(p_s, middle))]
    assert kl(STUDENT, TEACHER, T).tolist() == pytest.approx(forward, rel=1e-12)
    assert reverse_kl(STUDENT, TEACHER, T).tolist() == pytest.approx(back, rel=1e-12)
    assert symmetric_kl(STUDENT, TEACHER, T).tolist() == pytest.approx(
        [(a + b) / 2 for a, b in zip(forward, back)], rel=1e-12
    )
    assert js(STUDENT, TEACHER, T).tolist() == pytest.approx(half, rel=1e-12)


def test_a_sure_teacher_makes_the_divergence_the_cross_entropy_of_its_class():
    sure = torch.tensor([[0.0, 800.0, 0.0], [800.0, 0.0, 0.0]], dtype=torch.float64)
    expected = F.cross_entropy(STUDENT, torch.tensor([1, 0]), reduction="none")
    torch.testing.assert_close(kl(STUDENT, sure), expected)
    torch.testing.assert_close(hard_ce(STUDENT, sure), expected)
    assert torch.isfinite(js(STUDENT, sure)).all()


def test_the_mean_over_the_batch_is_that_of_torch_and_not_the_mean_over_its_elements():
    ours = reduced(kl(STUDENT, TEACHER, T))
    log_p, log_q = (F.log_softmax(z / T, 1) for z in (TEACHER, STUDENT))
    theirs = T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    elements = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    assert float(ours) == pytest.approx(3 * T**2 * float(elements.mean()), rel=1e-12)


def test_the_factor_keeps_the_gradient_as_the_temperature_grows():
    def gradient(temperature):
        z = STUDENT.clone().requires_grad_()
        reduced(kl(z, TEACHER, temperature)).backward()
        return z.grad

    centred = STUDENT - STUDENT.mean(1, keepdim=True) - (TEACHER - TEACHER.mean(1, keepdim=True))
    torch.testing.assert_close(gradient(1e4), centred / 3 / 2, rtol=1e-3, atol=1e-4)  # (z_s - z_t) / K / B


def test_cross_entropy_with_soft_targets_is_the_divergence_and_the_entropy_of_the_targets():
    target = F.softmax(TEACHER / T, 1)
    expected = kl(STUDENT, TEACHER, T) + T**2 * entropy(TEACHER, T)
    torch.testing.assert_close(soft_ce(STUDENT, target, T), expected, rtol=1e-12, atol=1e-12)
    one_hot = F.one_hot(torch.tensor([2, 0]), 3).double()
    torch.testing.assert_close(
        soft_ce(STUDENT, one_hot), F.cross_entropy(STUDENT, torch.tensor([2, 0]), reduction="none")
    )


def test_weights_are_of_items_and_have_no_gradient():
    losses = torch.tensor([2.0, 5.0], requires_grad=True)
    weights = torch.tensor([0.7, 3.0], requires_grad=True)
    mean = reduced(losses, weights)
    mean.backward()
    assert float(mean.detach()) == pytest.approx((1.4 + 15) / 2)
    assert weights.grad is None
    assert losses.grad.tolist() == pytest.approx([0.35, 1.5])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_predictions_cost_nothing_and_halves_are_computed_in_float32(name):
    loss = DIVERGENCES[name]
    assert loss(TEACHER + 4.0, TEACHER, T).abs().max() < 1e-12
    halves = loss(STUDENT.bfloat16(), TEACHER.bfloat16(), T)
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, loss(STUDENT.bfloat16().float(), TEACHER.bfloat16().float(), T))


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_classes_and_mixed_labels_have_a_class():
    assert float(entropy(torch.zeros(1, 7))) == pytest.approx(math.log(7))
    assert class_of(torch.tensor([[0.2, 0.1, 0.7]])).tolist() == [2] == class_of(torch.tensor([2])).tolist()


LABELS = torch.tensor([2, 1])


def test_decoupled_distillation_is_its_two_divergences_written_out():
    p_s, p_t = probabilities(STUDENT), probabilities(TEACHER)
    expected = []
    for s, t, y in zip(p_s, p_t, LABELS.tolist()):
        label = t[y] * math.log(t[y] / s[y]) + (1 - t[y]) * math.log((1 - t[y]) / (1 - s[y]))
        others = [c for c in range(3) if c != y]
        among = sum(t[c] / (1 - t[y]) * math.log((t[c] / (1 - t[y])) / (s[c] / (1 - s[y]))) for c in others)
        expected.append(T**2 * (1.3 * label + 2.7 * among))
    assert dkd(STUDENT, TEACHER, LABELS, T, (1.3, 2.7)).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_two_parts_weighted_by_the_teacher_are_the_divergence():
    """KL = KL(b_t || b_s) + (1 - p_t,y) KL(r_t || r_s): what the paper begins with."""
    p_label = F.softmax(TEACHER / T, 1)[torch.arange(2), LABELS]
    label, others = dkd(STUDENT, TEACHER, LABELS, T, (1, 0)), dkd(STUDENT, TEACHER, LABELS, T, (0, 1))
    torch.testing.assert_close(
        label + (1 - p_label) * others, kl(STUDENT, TEACHER, T), rtol=1e-12, atol=1e-12
    )
    mixed = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    assert torch.equal(dkd(STUDENT, TEACHER, mixed, T), dkd(STUDENT, TEACHER, LABELS, T))


def test_a_teacher_without_a_doubt_about_its_label_leaves_the_others_to_be_learnt():
    sure = torch.tensor([[1.0, 2.0, 90.0], [0.5, 95.0, -0.5]], dtype=torch.float64)
    plain, decoupled = kl(TEACHER, sure), dkd(STUDENT, sure, LABELS, 1.0, (0, 1))
    assert torch.isfinite(plain).all()
    assert (decoupled > 0.05).all()


def test_correlations_are_those_of_numpy_over_classes_and_over_the_batch():
    numpy = pytest.importorskip("numpy")
    s, t = (F.softmax(z / T, 1).numpy() for z in (STUDENT, TEACHER))
    of_items = [1 - numpy.corrcoef(a, b)[0, 1] for a, b in zip(s, t)]
    of_classes = numpy.mean([1 - numpy.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T)])
    expected = [T**2 * (value + 0.7 * of_classes) for value in of_items]
    assert dist(STUDENT, TEACHER, T, 0.7).tolist() == pytest.approx(expected, rel=1e-9)


def test_correlation_does_not_ask_for_equal_predictions_and_is_finite_for_constant_ones():
    probabilities = F.softmax(TEACHER, 1)
    flatter = (0.4 * probabilities + 0.2).log()  # a p + b of each item, summing to 1
    assert dist(flatter, TEACHER, 1.0).abs().max() < 1e-12
    assert kl(flatter, TEACHER).min() > 0.01
    constant = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss = dist(constant, TEACHER, 1.0, 0.5)
    reduced(loss).backward()
    assert loss.tolist() == pytest.approx([1.5, 1.5])
    assert torch.isfinite(constant.grad).all()
    assert dist(STUDENT.bfloat16(), TEACHER.bfloat16()).dtype == torch.float32

import math

import pytest
import torch

from distill_core.metrics.classification import (
    accuracy,
    calibration_error,
    confusion_matrix,
    group_accuracy,
    negative_log_likelihood,
    reliability,
    risk_coverage_area,
    total_variation,
    worst_class_accuracy,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 1, 0, 1])


def test_accuracy_counts_the_highest_or_the_top_few():
    assert accuracy(LOGITS, LABELS) == 0.5
    assert accuracy(LOGITS, LABELS, top=2) == 1


def test_the_confusion_matrix_has_labels_as_rows():
    assert confusion_matrix(LOGITS, LABELS).tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_equal_logits_cost_the_logarithm_of_the_classes():
    assert negative_log_likelihood(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)) == pytest.approx(
        math.log(3)
    )


def test_the_likelihood_is_that_of_the_labels():
    wanted = sum(
        math.log(sum(map(math.exp, row))) - row[k] for row, k in zip(LOGITS.tolist(), LABELS.tolist())
    )
    assert negative_log_likelihood(LOGITS, LABELS) == pytest.approx(wanted / 4)


def test_gaps_of_two_bins_do_not_cancel():
    """Four answers of confidence 0.9, all wrong, and two of 0.6, both right."""
    logits = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2).log()
    assert calibration_error(logits, torch.ones(6, dtype=torch.int64)) == pytest.approx(
        (4 * 0.9 + 2 * 0.4) / 6
    )


def test_sure_answers_share_the_last_bin_with_nearly_sure_ones_alone():
    logits = torch.tensor([[1.0, 1e-9], [0.91, 0.09]]).log()
    found = calibration_error(logits, torch.tensor([1, 0]), bins=10)
    assert found == pytest.approx(abs(1 - 1.91) / 2, abs=1e-6)  # both in the bin from 0.9 on
    apart = torch.tensor([[1.0, 1e-9], [0.89, 0.11]]).log()
    assert calibration_error(apart, torch.tensor([1, 0]), bins=10) == pytest.approx((1 + 0.11) / 2, abs=1e-6)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    sure = torch.tensor([[100.0, 0.0]]).repeat(4, 1)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    assert calibration_error(sure, torch.zeros(4, dtype=torch.int64)) == pytest.approx(0, abs=1e-9)


def test_total_variation_is_one_for_disjoint_classes():
    assert total_variation(torch.tensor([0, 0]), torch.tensor([1, 2]), 3) == 1
    assert total_variation(torch.tensor([0, 1]), torch.tensor([1, 0, 0, 1]), 3) == 0
    more = torch.tensor([0, 0, 1, 2, 3])  # shares 0.4, 0.2, 0.2, 0.2 against a quarter each
    assert total_variation(more, torch.tensor([3, 2, 1, 0]), 4) == pytest.approx(0.15)
    two = torch.tensor([0, 0, 1, 1, 1])  # 0.4, 0.6 against 0.1, 0.1, 0.8: no class alone is as far
    assert total_variation(two, torch.tensor([0, 1] + [2] * 8), 3) == pytest.approx(0.8)
    assert total_variation(two, torch.tensor([2, 3]), 4) == 1


def test_the_worst_class_accuracy_is_that_of_the_class_that_fails():
    labels = torch.tensor([0, 0, 0, 0, 3, 3])
    predicted = torch.tensor([0, 0, 0, 1, 3, 0])
    logits = torch.nn.functional.one_hot(predicted, 5).float()
    assert worst_class_accuracy(logits, labels) == 0.5
    assert worst_class_accuracy(torch.nn.functional.one_hot(labels, 5).float(), labels) == 1


def test_the_risk_coverage_area_is_the_mean_error_among_the_surest():
    logits = torch.tensor([[9.0, 0.0], [5.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])  # sorted by confidence: right, wrong, right, wrong
    assert risk_coverage_area(logits, labels) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    shuffled = torch.tensor([2, 0, 3, 1])
    assert risk_coverage_area(logits[shuffled], labels[shuffled]) == pytest.approx(4 / 12)


def test_equally_sure_answers_have_no_order():
    logits = torch.tensor([[2.0, 0.0]]).expand(5, 2)
    for labels in ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0]):
        assert risk_coverage_area(logits, torch.tensor(labels)) == pytest.approx(2 / 5)


def test_the_accuracy_of_a_group_is_of_its_labels_alone():
    assert group_accuracy(LOGITS, LABELS, [1]) == 0.5
    assert group_accuracy(LOGITS, torch.tensor([0, 2, 2, 1]), [0, 2]) == pytest.approx(2 / 3)
    assert math.isnan(group_accuracy(LOGITS, LABELS, [2]))


@pytest.mark.parametrize("bins", [15, 7])
def test_figures_are_those_of_torchmetrics(bins):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    torch.manual_seed(5)
    labels = torch.randint(0, 6, (500,))
    logits = (torch.randn(500, 6) + 2 * torch.nn.functional.one_hot(labels, 6)) * torch.rand(500, 1) * 4
    probabilities = logits.double().softmax(1)
    theirs = functional.multiclass_calibration_error(probabilities, labels, 6, n_bins=bins, norm="l1")
    assert calibration_error(logits, labels, bins=bins) == pytest.approx(float(theirs), abs=1e-6)
    assert theirs > 0.02
    for top in (1, 3):
        theirs = functional.multiclass_accuracy(logits, labels, 6, average="micro", top_k=top)
        assert accuracy(logits, labels, top=top) == pytest.approx(float(theirs), abs=1e-6)
    by_class = functional.multiclass_accuracy(logits, labels, 6, average="none")
    assert worst_class_accuracy(logits, labels) == pytest.approx(float(by_class.min()), abs=1e-6)
    assert torch.equal(
        confusion_matrix(logits, labels), functional.multiclass_confusion_matrix(logits, labels, 6)
    )


def test_the_bins_of_a_reliability_diagram_give_the_calibration_error():
    torch.manual_seed(6)
    logits, labels = torch.randn(300, 4) * 3, torch.randint(0, 4, (300,))
    bins = reliability(logits, labels, bins=9)
    assert bins.items.sum() == 300
    gaps = (bins.accuracy - bins.confidence).abs() * bins.items
    assert float(gaps.nansum()) / 300 == pytest.approx(calibration_error(logits, labels, bins=9), abs=1e-12)
    assert torch.isnan(bins.accuracy[0])  # nobody is less sure than 1 / 4
    assert ((bins.confidence * 9).int()[2:] == torch.arange(2, 9)).all()

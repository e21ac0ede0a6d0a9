import math

import pytest
import torch

from distill_core.metrics.classification import (
    accuracy,
    calibration_error,
    confusion_matrix,
    negative_log_likelihood,
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


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    sure = torch.tensor([[100.0, 0.0]]).repeat(4, 1)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    assert calibration_error(sure, torch.zeros(4, dtype=torch.int64)) == pytest.approx(0, abs=1e-9)


def test_total_variation_is_one_for_disjoint_classes():
    assert total_variation(torch.tensor([0, 0]), torch.tensor([1, 2]), 3) == 1
    assert total_variation(torch.tensor([0, 1]), torch.tensor([1, 0, 0, 1]), 3) == 0


def test_the_worst_class_accuracy_is_that_of_the_class_that_fails():
    labels = torch.tensor([0, 0, 0, 0, 3, 3])
    predicted = torch.tensor([0, 0, 0, 1, 3, 0])
    logits = torch.nn.functional.one_hot(predicted, 5).float()
    assert worst_class_accuracy(logits, labels) == 0.5
    assert worst_class_accuracy(torch.nn.functional.one_hot(labels, 5).float(), labels) == 1

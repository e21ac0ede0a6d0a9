"""Spread within classes against what NumPy and a closed form say."""

from __future__ import annotations

import pytest
import torch

from distill_core.metrics.diversity import within_class_std


def test_the_distance_between_classes_does_not_count():
    noise = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2000) % 2
    pictures = 0.3 * noise + 5.0 * labels.reshape(-1, 1, 1, 1)
    assert within_class_std(pictures, labels) == pytest.approx(0.3, rel=0.02)
    assert within_class_std(pictures) == pytest.approx((0.09 + 6.25) ** 0.5, rel=0.02)


def test_classes_count_equally_and_a_repeated_picture_not_at_all():
    pictures = torch.cat([torch.zeros(30, 1, 1, 1), torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)])
    labels = torch.cat([torch.zeros(30), torch.ones(2)])
    assert within_class_std(pictures, labels) == pytest.approx(0.5**0.5)

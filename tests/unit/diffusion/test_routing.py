"""Which expert answers: the table of classes, and the nearest centroid after its handicap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core.diffusion.routing import PartitionSpec, class_parts, prompt_parts


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_a_class_has_the_part_of_its_row_and_what_is_no_class_the_default(array):
    spec = PartitionSpec(kind="class_label", parts=3, of_class=(2, 0, 1, 2), default=1)
    labels = array([3, 0, 1, 2, 4, -1, 99])
    assert class_parts(labels, array(spec.table)).tolist() == [2, 2, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("array", [np.asarray, torch.from_numpy])
def test_a_prompt_has_the_part_of_its_nearest_centroid_less_its_offset(array):
    random = np.random.default_rng(4)
    embeds = 2 * random.normal(size=(200, 3))
    centroids = np.array([[0.3, 0, 0.2], [2, 1, -1], [-1, 3, 0.5], [0.5, -2, 2], [-2, -2, -3]])
    offsets = np.array([-0.7, 1.5, -2.0, 0.7, 3.0])
    squared = ((embeds[:, None] - centroids) ** 2).sum(-1) - offsets
    found = prompt_parts(array(embeds), array(centroids), array(offsets))
    assert found.tolist() == squared.argmin(1).tolist()
    assert set(found.tolist()) == {0, 1, 2, 3, 4}

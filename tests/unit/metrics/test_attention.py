"""Figures of attention and features, each where its value is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.metrics.attention import (
    attention_distance,
    attention_maps,
    effective_rank,
    head_similarity,
    heads_of,
)


def test_maps_are_those_whose_mean_of_values_is_attention():
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = torch.randn(3, 2, 7, 12, generator=generator)
    maps = attention_maps(queries, keys, 3)
    split = [heads_of(tokens, 3) for tokens in (queries, keys, values)]
    torch.testing.assert_close(maps @ split[2], F.scaled_dot_product_attention(*split))


def test_patches_that_look_right_look_one_patch_far_and_prefixes_do_not_count():
    maps = torch.full((1, 2, 7, 7), 1e-9)  # a prefix, then two rows of three
    for patch, target in enumerate((1, 2, 1, 4, 5, 4)):
        maps[0, 0, 1 + patch, 1 + target] = 0.3
        maps[0, 0, 1 + patch, 0] = 0.7
        maps[0, 1, 1 + patch, 1 + (patch + 3) % 6] = 1.0
    assert attention_distance(maps[:, :1], 3, 1) == pytest.approx(1.0, abs=1e-5)
    assert attention_distance(maps, 3, 1) == pytest.approx(1.0, abs=1e-5)
    corner = torch.zeros(1, 1, 6, 6)
    corner[..., 5] = 1
    expected = ((1 + 4) ** 0.5 + (1 + 1) ** 0.5 + 1 + 2 + 1 + 0) / 6
    assert attention_distance(corner, 3, 0) == pytest.approx(expected, rel=1e-5)


def test_equal_heads_are_alike_and_heads_that_look_elsewhere_are_not():
    maps = torch.eye(4).expand(2, 3, 4, 4).clone()
    assert head_similarity(maps) == pytest.approx(1)
    maps[:, 1] = maps[:, 1].roll(1, 1)
    assert head_similarity(maps) == pytest.approx(1 / 3)  # one pair of three is left
    maps[:, 2] = maps[:, 2].roll(2, 1)
    assert head_similarity(maps) == pytest.approx(0)


def test_the_rank_counts_directions_of_equal_strength():
    rows = torch.cat([torch.eye(5)[:3] * 2.4, -torch.eye(5)[:3] * 2.4]) + 7
    assert effective_rank(rows.reshape(2, 3, 5)) == pytest.approx(3, rel=1e-4)
    assert effective_rank(rows[:, :1].reshape(2, 3, 1)) == pytest.approx(1, rel=1e-4)

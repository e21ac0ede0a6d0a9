"""The perceptual distance: its two similarities, and what its feature maps are made of."""

from __future__ import annotations

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.losses.perceptual import structure_texture_distance
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.perceptual import FeatureDistance


def classifier(shape=(1, 8, 8)) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(shape=shape, num_classes=3, width=8))


def test_equal_maps_have_no_distance():
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert structure_texture_distance(maps, maps).item() == pytest.approx(0, abs=1e-6)


def test_another_mean_costs_texture_and_another_place_costs_structure():
    pattern = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    moved = pattern.roll(1, 3)  # the same mean, the opposite pattern
    base, brighter = pattern + 2, pattern + 4
    # l = 2 * 2 * 4 / (4 + 16), s = 1
    assert structure_texture_distance([brighter], [base]).item() == pytest.approx(1 - (0.8 + 1) / 2, abs=1e-5)
    # l = 1, s = -1
    assert structure_texture_distance([moved + 2], [base]).item() == pytest.approx(1.0, abs=1e-5)


def test_another_contrast_costs_structure():
    pattern = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0]).reshape(1, 1, 2, 3)
    for one, other in ((3 * pattern + 2, pattern + 2), (pattern + 2, 3 * pattern + 2)):
        # l = 1, s = 2 * 3 / (1 + 9)
        assert structure_texture_distance([one], [other]).item() == pytest.approx(1 - (1 + 0.6) / 2, abs=1e-5)


def test_layers_count_equally_whatever_their_size():
    same = torch.ones(1, 1, 8, 8) + torch.randn(1, 1, 8, 8)
    pattern = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 2, 2) + 2
    moved = pattern.roll(1, 3)
    assert structure_texture_distance([same, moved], [same, pattern]).item() == pytest.approx(0.5, abs=1e-5)


def test_the_pictures_themselves_and_every_stage_are_compared():
    network, pictures = classifier(), torch.randn(2, 1, 8, 8)
    maps = FeatureDistance(network, (1, 8, 8)).maps(pictures)
    assert maps[0] is pictures
    assert len(maps) == 1 + len(network.blocks)
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps[-1], 2).flatten(1)
    assert torch.equal(torch.nn.functional.silu(network.penultimate(pooled)), network.features(pictures))


def test_the_distance_pulls_pictures_and_never_the_classifier():
    network = classifier()
    distance = FeatureDistance(network, (1, 8, 8))
    pictures, targets = torch.randn(4, 1, 8, 8, requires_grad=True), torch.randn(4, 1, 8, 8)
    loss = distance(pictures, targets)
    loss.backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        assert distance(pictures - 5 * pictures.grad, targets) < loss


def test_no_classifier_and_one_of_other_pictures_are_refused():
    with pytest.raises(ConfigError, match=r"set \[extractor\]"):
        FeatureDistance(None, (1, 8, 8))
    with pytest.raises(ConfigError, match=r"of the shape \(1, 8, 8\), and these are \(3, 8, 8\)"):
        FeatureDistance(classifier(), (3, 8, 8))

"""Attacks against a linear classifier, whose smallest perturbation is known, and the sight of masked gradients."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from distill_core.errors import Unavailable
from distill_core.metrics.attacks import AttackConfig, attacked, zero_gradients

pytestmark = pytest.mark.skipif(importlib.util.find_spec("art") is None, reason="needs the extra attacks")
SHAPE = (1, 3, 5)


class Linear(nn.Module):
    """Two classes, apart by a plane of which every weight counts."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        w = torch.linspace(0.3, 1.7, 15) * torch.tensor([1.0, -1.0] * 7 + [1.0])
        self.w = nn.Parameter(scale * torch.stack([w, torch.zeros(15)]))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1) @ self.w.T


def pictures(count=8):
    x0 = 0.6 * (2 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(2)) - 1)
    return x0, Linear()(x0).argmax(1)


@pytest.mark.slow
def test_fgsm_and_the_smallest_perturbation_are_those_of_the_plane():
    x0, labels = pictures()
    network, w = Linear(), Linear().w[0].detach()
    margin = (x0.flatten(1) @ w).abs()
    config = AttackConfig(epsilon=0.05, cw_steps=300, cw_searches=9, items=8)
    found = attacked(network, x0, labels, config)
    survive = (margin > 0.1 * w.abs().sum()).double().mean()  # 0.05 of [0, 1] is 0.1 of [-1, 1]
    assert 0 < survive < 1
    assert found["fgsm_accuracy"] == found["pgd_accuracy"] == pytest.approx(float(survive))
    assert found["cw_success"] == 1
    assert found["cw_distance"] == pytest.approx(float((margin / w.norm()).median()) / 2, rel=0.1)


@pytest.mark.slow
def test_large_logits_hide_the_gradient_and_dividing_them_shows_it_again():
    x0, labels = pictures()
    config = AttackConfig(epsilon=0.05, cw_steps=100, cw_searches=3, items=8)
    plain, masked = (
        attacked(Linear(), x0, labels, config),
        attacked(Linear(2e3), x0, labels, config, masking=2e3),
    )
    assert plain["zero_gradient_share"] == 0
    assert masked["zero_gradient_share"] > 0.8
    assert masked["fgsm_accuracy"] > plain["fgsm_accuracy"]
    assert masked["unmasked_fgsm_accuracy"] == plain["fgsm_accuracy"]
    assert masked["cw_success"] == 1


def test_a_gradient_that_is_not_zero_everywhere_is_none_that_is_zero():
    x0, labels = pictures()
    assert zero_gradients(Linear(), x0, labels) == 0
    assert zero_gradients(Linear(1e4), x0, labels) == 1
    assert not x0.requires_grad


def test_without_the_toolbox_a_sentence_says_what_to_install(monkeypatch, context, tmp_path):
    from tests.helpers import tiny_trainer

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"adversarial-robustness-toolbox is not installed.*attacks"):
        tiny_trainer("defensive", context, tmp_path)

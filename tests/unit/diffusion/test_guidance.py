"""Guidance: its convention, and the scale that a training step takes."""

from __future__ import annotations

import torch

from distill_core.diffusion.guidance import GuidanceLaw, guide


def test_one_is_the_conditional_prediction_and_beyond_it_leads_away_from_the_other():
    cond, uncond = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.5])
    assert guide(cond, uncond, 1.0).tolist() == [3.0, -1.0]
    assert guide(cond, uncond, 0.0).tolist() == [1.0, 0.5]
    assert guide(cond, uncond, 2.5).tolist() == [6.0, -3.25]


def test_a_fixed_law_draws_nothing_and_a_range_one_scale_for_each_item():
    state = torch.get_rng_state()
    assert GuidanceLaw.fixed(4.5).draw(torch.zeros(3, 2)) == 4.5
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    drawn = GuidanceLaw(0.75, 4.25).draw(torch.zeros(500, 2))
    assert drawn.shape == (500,)
    assert 0.75 <= drawn.min() < 0.8
    assert 4.2 < drawn.max() <= 4.25


def test_only_a_law_that_is_always_one_is_off():
    laws = [GuidanceLaw(1, 1), GuidanceLaw(1, 2), GuidanceLaw(0.5, 1), GuidanceLaw(3, 3)]
    assert [law.is_off for law in laws] == [True, False, False, False]

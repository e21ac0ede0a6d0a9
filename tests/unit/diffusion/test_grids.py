"""Grids of levels and their segments, for every index and every number of segments that divides them."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.grids import LevelGrid
from distill_core.diffusion.schedule import NoiseSchedule

EDM, FLOW = NoiseSchedule("edm", sigma_min=0.02, sigma_max=10.0), NoiseSchedule("flow", sigma_max=999.0)


@pytest.fixture
def grid():
    return LevelGrid((*EDM.spread(10.0, 24), 0.0))


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8, 24])
def test_an_interval_lies_above_its_segments_end_which_is_at_most_its_own(grid, segments):
    index = torch.arange(24)
    end = grid.segment_end(index, segments)
    assert (end >= index + 1).all()
    assert (end <= 24).all()
    assert (grid.at(end) <= grid.at(index + 1)).all()
    assert (grid.at(index + 1) < grid.at(index)).all()
    assert sorted(set(end.tolist())) == [24 // segments * (k + 1) for k in range(segments)]
    torch.manual_seed(0)
    inner = torch.stack([grid.inner_end(index, segments) for _ in range(400)])
    assert (inner >= index + 1).all()
    assert (inner <= end).all()
    for column in (0, 13):
        assert set(inner[:, column].tolist()) == set(range(column + 1, int(end[column]) + 1))


@pytest.mark.parametrize("schedule", [EDM, FLOW])
def test_a_coarse_grid_is_that_of_fewer_steps(schedule):
    fine = LevelGrid((*schedule.spread(9.0, 24), 0.0))
    assert fine.coarse(6).levels == pytest.approx((*schedule.spread(9.0, 6), 0.0))
    with pytest.raises(ValueError, match="do not part"):
        fine.coarse(5)


def test_intervals_are_drawn_evenly(grid):
    torch.manual_seed(1)
    counts = torch.bincount(grid.draw(48_000), minlength=24)
    assert len(counts) == 24
    assert counts.min() > 1800


@pytest.mark.parametrize("levels", [(3.0, 1.0), (1.0, 3.0, 0.0), (2.0, 2.0, 0.0), (0.0,)])
def test_levels_that_do_not_descend_to_zero_are_no_grid(levels):
    with pytest.raises(ValueError, match="descend"):
        LevelGrid(levels)

"""BOSS: the grid it chooses, what a step of it is trained to do, and what a resumed run keeps."""

from __future__ import annotations

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.pairs import build_pairs
from distill_core.diffusion.bellman import bellman_grid
from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion.boss import BOSS
from distill_core.recipe.tables import EvaluateConfig, PairsConfig
from tests.oracles import AffineDenoiser

MEAN, STD = 0.3, 0.25


def method_of(folder, student=None, **config: object) -> BOSS:
    values = {"walk_steps": 30, "num_steps": 3, "probes": 40, "held_out": 24, **config}
    source = build_source({"name": "classes", "num_classes": 10})
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    pairs = build_pairs(teacher, source, PairsConfig(count=96, num_steps=2), folder / "pairs")
    student = student or AffineDenoiser(MEAN, STD)
    return BOSS(BOSS.Config.parse(values), teacher=teacher, student=student, pairs=pairs)


def test_the_grid_is_the_cheapest_on_the_walks_and_lands_nearer_than_even_steps(tmp_path):
    method = method_of(tmp_path)
    assert method.grid == (0, 10, 20, 30)
    next(method.updates(Batch.of(4), 0))
    assert method.grid == bellman_grid(method.costs(), 3) != (0, 10, 20, 30)
    spec = method.student.sampler
    assert spec.sigmas == tuple(method.levels[place] for place in method.grid[:3])
    assert (spec.num_steps, spec.step_counts, spec.eta) == (3, (3,), 0.0)
    figures = method.figures(EvaluateConfig(batch_size=10))
    assert figures["grid_error"] < 0.7 * figures["even_error"]
    assert figures["pair_distance"] == pytest.approx(figures["grid_error"], rel=1e-5)  # the student is a copy


def test_even_steps_stay_even_and_their_errors_are_one(tmp_path):
    method = method_of(tmp_path, grid="even")
    next(method.updates(Batch.of(4), 0))
    assert method.grid == (0, 10, 20, 30)
    figures = method.figures(EvaluateConfig(batch_size=10))
    assert figures["grid_error"] == figures["even_error"] > 0


def test_a_step_is_trained_to_land_where_the_walk_was_at_its_end(tmp_path):
    method = method_of(tmp_path, grid="even")
    walks, which = method.walks().at(torch.tensor([5, 6, 7])), torch.tensor([0, 2, 1])
    found = method.landing_error(walks, which)
    levels = [method.levels[place] for place in (0, 10, 20, 30)]
    for row, step in enumerate(which.tolist()):
        x, start, end = walks.states[row, step], levels[step], levels[step + 1]
        x0 = method.teacher(x[None], torch.tensor([start]))[0]
        landed = x0 + end / start * (x - x0)
        scale = 1 / (end**2 + 0.5**2) ** 0.5  # of the schedule's own form
        expected = (scale * (landed - walks.states[row, step + 1]) * 3).square().mean()
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-7)


def test_straightening_brings_the_student_s_steps_nearer_to_the_walk_s_end(tmp_path):
    method = method_of(tmp_path)
    optimizer = torch.optim.Adam(method.student.parameters(), 0.02)
    for step in range(80):
        torch.manual_seed(step)
        (update,) = method.updates(Batch.of(32), step)
        update.loss.backward(inputs=list(method.student.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    figures = method.figures(EvaluateConfig(batch_size=24))
    assert figures["pair_distance"] < 0.5 * figures["grid_error"]


def test_a_resumed_run_has_the_grid_that_was_chosen(tmp_path):
    method = method_of(tmp_path)
    next(method.updates(Batch.of(4), 0))
    resumed = method_of(tmp_path)
    resumed.load_state(method.state())
    assert resumed.grid == method.grid
    assert resumed.student.sampler == method.student.sampler
    assert resumed.chosen


def test_more_steps_than_the_walk_has_and_missing_pairs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="31 steps cannot be chosen of a walk of 30") as told:
        method_of(tmp_path, num_steps=31)
    assert told.value.field == "config.num_steps"
    with pytest.raises(ConfigError, match="more than the 96 that are held out"):
        method_of(tmp_path, held_out=96)

"""States of a model's own walks: exact, made once, and only of the model that they are asked of."""

from __future__ import annotations

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.pairs import build_pairs
from distill_core.data.trajectories import build_trajectories
from distill_core.errors import ConfigError
from distill_core.recipe.tables import PairsConfig
from tests.oracles import AffineDenoiser

MEAN, STD, START = 0.4, 0.3, 10.0


def pairs_in(folder, **table: object):
    source = build_source({"name": "classes", "num_classes": 3})
    return build_pairs(
        AffineDenoiser(MEAN, STD), source, PairsConfig.parse({"count": 24, "num_steps": 2, **table}), folder
    )


def levels_of(count: int) -> list[float]:
    return [START * (1 - k / count) ** 3 for k in range(count + 1)]


def exact(z: torch.Tensor, level: float) -> torch.Tensor:
    """The state at `level` of the Gaussian's ODE through START z."""
    return MEAN + (START * z - MEAN) * ((STD**2 + level**2) / (STD**2 + START**2)) ** 0.5


def test_states_approach_the_ode_by_half_as_the_steps_double(tmp_path):
    pairs, errors = pairs_in(tmp_path / "pairs"), []
    for count in (40, 80):
        walks = build_trajectories(pairs, AffineDenoiser(MEAN, STD), levels_of(count), (0, count // 2, count))
        indices = torch.tensor([3, 17, 23])
        states, z = walks.at(indices).states, pairs.at(indices).z
        assert torch.equal(states[:, 0], START * z)
        errors.append((states[:, 1] - exact(z, levels_of(count)[count // 2])).abs().max())
        errors.append((states[:, 2] - exact(z, 0.0)).abs().max())
    assert 1.7 < errors[0] / errors[2] < 2.3
    assert 1.6 < errors[1] / errors[3] < 2.4
    assert walks.at(torch.tensor([4])).cond["class_label"].tolist() == [1]


def test_walks_are_found_again_and_are_others_for_other_weights_levels_places_and_guidance(tmp_path):
    pairs, model = pairs_in(tmp_path / "pairs"), AffineDenoiser(MEAN, STD)
    build_trajectories(pairs, model, levels_of(4), (0, 2, 4))
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.safetensors")}
    build_trajectories(pairs, model, levels_of(4), (0, 2, 4))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.safetensors")} == made
    build_trajectories(pairs, AffineDenoiser(MEAN, 0.31), levels_of(4), (0, 2, 4))
    build_trajectories(pairs, model, levels_of(5), (0, 2, 4))
    build_trajectories(pairs, model, levels_of(4), (0, 3, 4))
    build_trajectories(pairs, model, levels_of(4), (0, 2, 4), guidance=3.0)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(made) + 4


def test_states_that_take_more_room_than_pairs_are_refused_before_the_walk(tmp_path):
    pairs = pairs_in(tmp_path / "pairs", count=1000, max_gib=2e-5)  # pairs alone fit
    with pytest.raises(ConfigError, match=r"items of shape \(3, 1, 2, 2\)"):
        build_trajectories(pairs, AffineDenoiser(MEAN, STD), levels_of(4), (0, 2, 4))

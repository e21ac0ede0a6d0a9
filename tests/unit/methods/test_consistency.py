"""Consistency distillation and its variants against an exact mixture teacher: targets, boundaries, ends and noise."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.diffusion.solvers import SolverConfig, advance
from distill_core.diffusion.trajectory import jump, renoise
from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion import consistency, lcm, mlcm, scott, slam, tscd
from distill_core.methods.diffusion._consistency import ConsistencyConfig, Points
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS
from tests.oracles import MixtureDenoiser

COND = {"class_label": torch.tensor([0, 1, 2, 1, 0, 2, 3, 1])}


def made(module=consistency, method="Consistency", **config):
    teacher = MixtureDenoiser()
    options = getattr(module, "Config", ConsistencyConfig)(**config)
    return getattr(module, method)(options, teacher=teacher, student=copy.deepcopy(teacher))


def batch():
    torch.manual_seed(0)
    return Batch.of(8, MixtureDenoiser().samples(8), COND)


def test_a_point_moves_one_guided_solver_step_down_the_grid():
    method = made(num_levels=8, guidance=2.3, solver=SolverConfig(kind="ddim"))
    points = method.points(batch(), 0)
    guided = method.teacher.guided(points.x, points.sigma, COND, 2.3)
    torch.testing.assert_close(points.moved, jump(points.x, guided, points.sigma, points.following))
    levels = list(method.grid.levels)
    for sigma, following in zip(points.sigma.tolist(), points.following.tolist(), strict=True):
        at = min(range(8), key=lambda index: abs(levels[index] - sigma))
        assert following == pytest.approx(levels[at + 1])
    assert points.end.abs().max() == 0


def test_what_is_wanted_is_the_targets_answer_and_at_the_last_level_the_point_itself():
    method = made(num_levels=4, solver=SolverConfig(kind="heun"))
    method.target.network.means += 0.5  # not the student
    points = method.points(batch(), 0)
    wanted = method.wanted(points)
    last = points.following == 0
    assert last.any()
    assert not last.all()
    assert torch.equal(wanted[last], points.moved[last])
    led = method.target(points.moved, points.following.clamp_min(1e-3), COND)
    torch.testing.assert_close(wanted[~last], led[~last])
    assert not torch.allclose(led[~last], method.student(points.moved, points.following, COND)[~last])


def test_a_student_that_knows_the_end_of_every_trajectory_has_no_loss():
    """Of one Gaussian the end is known: deviations shrink by s / sqrt(s^2 + sigma^2)."""
    mean, std = torch.tensor([0.4, -0.3], dtype=torch.float64), 0.37

    def ends(x, sigma, cond=None):
        return mean + (x - mean) * (std / (std**2 + sigma.double()[:, None, None, None] ** 2).sqrt())

    teacher = MixtureDenoiser(means=((0.4, -0.3),), stds=(std,))
    config = ConsistencyConfig(num_levels=16, solver=SolverConfig(kind="heun", substeps=20))
    method = consistency.Consistency(config, teacher=teacher, student=copy.deepcopy(teacher))
    torch.manual_seed(0)
    points = method.points(Batch.of(64, teacher.samples(64), {"class_label": torch.zeros(64).long()}), 0)
    method.target.network.forward = method.student.forward = ends
    exact, wanted = method.output(points), method.wanted(points)
    assert float((exact - wanted).abs().max()) < 2e-3
    method.student.forward = teacher.forward
    assert float((method.output(points) - wanted).abs().mean()) > 0.05


@pytest.mark.parametrize("inner_end", ["random", "segment"])
def test_segments_become_fewer_and_end_at_or_above_their_own_end(inner_end):
    method = made(tscd, "TSCD", num_levels=16, segments=(4, 2, 1), inner_end=inner_end, step_counts=(1, 4))
    stages = method.stages(method.config, 9)
    assert [(stage.name, stage.steps) for stage in stages] == [
        ("segments_4", 3),
        ("segments_2", 3),
        ("segments_1", 3),
    ]
    method.stage_of = lambda step: stages[step // 3]
    index = torch.arange(16)
    torch.manual_seed(0)
    for step, segments in ((0, 4), (5, 2), (8, 1)):
        end, border = method.end_of(index, step), method.grid.segment_end(index, segments)
        assert (end > index).all()
        assert (end <= border).all()
        assert torch.equal(end, border) == (inner_end == "segment")
    assert method.student.sampler.eta == 0
    assert method.student.sampler.step_counts == (1, 4)


def test_states_of_a_guided_trajectory_follow_each_other_from_noise_to_data():
    method = made(mlcm, "MLCM", num_levels=8, segments=(4, 2), states=4, guidance=1.7, step_counts=(2, 4))
    points = method.points(Batch.of(8, None, COND), 0)
    assert points.x.shape == (8, 1, 1, 2)
    assert points.cond["class_label"].tolist() == [0, 1] * 4
    guided = method.teacher.guided(points.x, points.sigma, points.cond, 1.7)
    torch.testing.assert_close(points.moved, jump(points.x, guided, points.sigma, points.following))
    torch.manual_seed(1)
    states = method.trajectories(2, {"class_label": COND["class_label"][:2]})
    assert states.shape == (9, 2, 1, 1, 2)
    torch.manual_seed(1)
    noise = torch.randn(2, 1, 1, 2) * method.student.sampler.noise_scale
    assert torch.equal(states[0], noise)


def test_a_stochastic_move_spreads_around_the_deterministic_one():
    teacher = MixtureDenoiser()
    torch.manual_seed(0)
    x, sigma = teacher.samples(500), torch.full((500,), 1.3)
    solver = scott.Config().solver
    assert (solver.kind, solver.eta) == ("sde", 0.3)
    one, two = (advance(teacher, x, sigma, 0.6 * sigma, solver) for _ in range(2))
    still = advance(teacher, x, sigma, 0.6 * sigma, SolverConfig(kind="ddim", substeps=4))
    in_one_step = 0.3 * 0.6 * 1.3 * (1 - 0.36) ** 0.5
    spread = float((one - two).std() / 2**0.5)
    in_all = 0.3 * 1.3 * (1 - 0.36) ** 0.5  # what is fresh, were none of it denoised again
    assert in_one_step < spread < in_all
    assert float((one - still).mean().abs()) < 0.05


def test_an_lcm_is_told_no_guidance_and_serves_its_numbers_of_steps():
    method = made(lcm, "LCM", num_levels=16, guidance=3.0, step_counts=(1, 2, 4), start=5.0)
    spec = method.student.sampler
    assert (spec.guidable, spec.eta, spec.step_counts) == (False, 1.0, (1, 2, 4))
    assert spec.levels(2) == pytest.approx([method.grid.levels[0], method.grid.levels[8]])


@pytest.mark.parametrize(
    ("module", "values", "sentence"),
    [
        (consistency, {"num_levels": 32, "step_counts": [3]}, "must divide num_levels"),
        (consistency, {"step_counts": [2, 1]}, "ascending"),
        (tscd, {"segments": [1, 2]}, "descending"),
        (tscd, {"segments": [5]}, "must divide num_levels"),
        (mlcm, {"segments": [8, 3]}, "must divide num_levels"),
    ],
)
def test_steps_and_segments_that_do_not_lie_on_the_grid_are_refused(module, values, sentence):
    config = getattr(module, "Config", ConsistencyConfig)
    with pytest.raises(ConfigError, match=sentence):
        config.parse(values, where="config")


def between(count=20_000):
    """Forward-coupled neighbours x = x' + noise, as Points."""
    torch.manual_seed(0)
    sigma, following = torch.full((count,), 1.9), torch.full((count,), 1.1)
    x0 = torch.zeros(count, 1, 1, 1)
    moved = x0 + 1.1 * torch.randn(count, 1, 1, 1)
    x = renoise(moved, following, sigma)
    return Points(x, moved, sigma, following, 0 * sigma, {})


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_a_point_on_the_sub_path_has_the_noise_that_its_level_says(gamma):
    points = between()
    x, level = slam.sub_path_point(points, torch.full_like(points.sigma, gamma))
    assert float(x.std()) == pytest.approx(float(level[0]), rel=0.02)
    assert (gamma == 1) == torch.equal(x, points.x)
    assert (gamma == 1) == torch.equal(level, points.sigma)


def test_asked_at_the_sample_alone_the_sub_path_is_plain_consistency_to_the_bit():
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=TINY_NETWORKS["DiTTransformer2DModel"])
    teacher = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"num_levels": 8, "step_counts": (1, 2), "guidance": 1.0, "distance": "l2"}
    sub = slam.SLAM(slam.Config(at_sample=1.0, **options), teacher=teacher, student=copy.deepcopy(teacher))
    plain = consistency.Consistency(
        ConsistencyConfig(solver=SolverConfig(), **options), teacher=teacher, student=copy.deepcopy(teacher)
    )
    losses = []
    for method in (sub, plain):
        torch.manual_seed(4)
        data = Batch.of(8, torch.randn(8, 1, 8, 8), {"class_label": torch.arange(8)})
        (update,) = method.updates(data, 0)
        losses.append(update.loss)
    assert torch.equal(losses[0], losses[1])
    assert losses[0] > 0

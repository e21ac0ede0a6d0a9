"""SlimFlow against a Gaussian teacher: annealing, the two-step target, and both switches against their baselines."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.levels import expand
from distill_core.diffusion.trajectory import jump
from distill_core.method import Batch
from distill_core.methods.diffusion.slimflow import MIDDLE, SlimFlow
from distill_core.recipe.tables import EvaluateConfig
from tests.oracles import AffineDenoiser, StraightFlow
from tests.unit.methods.test_instaflow import END, MEAN, STD, ends, method_of, pairs_of, run


def slim(folder, student=None, **config: object) -> SlimFlow:
    values = {"reflow_steps": 150, "anneal_steps": 90, "held_out": 64, **config}
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    student = student or StraightFlow(-0.4, 0.7)
    return SlimFlow(SlimFlow.Config.parse(values), teacher=teacher, student=student, pairs=pairs_of(folder))


def loss_of(method, step: int) -> torch.Tensor:
    torch.manual_seed(5)
    return next(method.updates(Batch.of(9), step)).loss


def test_annealed_reflow_ends_in_the_straight_flow_of_the_pairs(tmp_path):
    method = slim(tmp_path)
    run(method, 0, 150)
    assert ends(method.student) == pytest.approx(END, abs=0.03)
    method.enter(method.stage_of(150))
    assert method.figures(EvaluateConfig(batch_size=24))["flow_pair_distance"] < 2e-3


def test_noise_is_fresh_at_first_and_the_pairs_own_at_the_end_and_always_of_unit_size(tmp_path):
    method = slim(tmp_path)
    shares = [method.fresh_share(step) for step in (0, 30, 90, 140)]
    assert shares == pytest.approx([1.0, 2 / 3, 0.0, 0.0])
    line = method.line(method.pairs.at(torch.arange(320)))
    for share in shares:
        torch.manual_seed(3)
        eps = method.annealed(line, share).eps
        both = torch.stack([eps.flatten(), line.eps.flatten()])
        assert float(eps.std() / line.eps.std()) == pytest.approx(1, abs=0.09)
        assert float(torch.corrcoef(both)[0, 1]) == pytest.approx((1 - share**2) ** 0.5, abs=0.06)
    assert method.annealed(line, 0.0) is line


def test_a_cold_start_is_plain_reflow_to_the_bit(tmp_path):
    losses = [loss_of(method, 3) for method in (slim(tmp_path, anneal_steps=0), method_of(tmp_path))]
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], loss_of(slim(tmp_path), 3))


def test_without_the_flow_s_guidance_distillation_is_that_of_stored_pairs_alone(tmp_path):
    method = slim(tmp_path, flow_guided=0.0)
    torch.manual_seed(5)
    line = method.drawn(9)
    naive = (method.first_call(method.student, line) - line.x0).square().mean()
    assert torch.equal(loss_of(method, 150), naive)
    guided = slim(tmp_path, flow_guided=0.7)
    torch.nn.init.constant_(guided.flow.mean, 0.9)  # else the student's own straight flow, and no distance
    torch.manual_seed(5)
    (update,) = guided.updates(Batch.of(9), 150)
    torch.testing.assert_close(update.loss, naive + 0.7 * update.metrics["guided"])
    assert float(update.metrics["guided"]) > 0.01


def test_the_target_of_fresh_noise_is_a_step_of_the_student_then_one_of_the_small_flow(tmp_path):
    method = slim(tmp_path, StraightFlow(-0.2, 0.6))
    method.enter(method.stage_of(150))
    with torch.no_grad():
        method.student.mean += 0.3
    z = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(8)
    loss = method.guided_loss(z, {})
    torch.manual_seed(8)
    t = MIDDLE[0] + (MIDDLE[1] - MIDDLE[0]) * torch.rand(5)
    middle, start = t / (1 - t), torch.full((5,), 10.0)
    first = 0.1 + 0.6 * z
    x = jump(10 * z, first, start, middle)
    left = 1 - expand(middle, z) / 10
    then = -0.2 + 0.6 * (x + 0.2 * left) / (left * 0.6 + expand(middle, z))
    torch.testing.assert_close(loss, (first - then).square().mean(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert float(method.student.mean.grad) > 0
    assert method.flow.mean.grad is None


def test_distillation_brings_a_student_back_to_the_flow_and_the_pairs(tmp_path):
    method = slim(tmp_path, StraightFlow(*END))
    method.enter(method.stage_of(150))
    with torch.no_grad():
        method.student.mean += 0.3
        method.student.log_std += 0.4
    run(method, 150, 350)
    assert ends(method.student) == pytest.approx(END, abs=0.02)
    assert ends(method.flow) == pytest.approx(END, abs=0.001)

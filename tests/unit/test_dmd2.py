"""DMD2 against an exact oracle: a Gaussian teacher, whose score is known in closed form."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distill_core.data import build_source
from distill_core.data.pairs import Pairs, build_pairs
from distill_core.errors import ConfigError
from distill_core.losses.denoising import add_noise
from distill_core.losses.matching import dm_direction, surrogate_loss
from distill_core.method import Batch
from distill_core.methods.diffusion.dmd2 import DMD2
from distill_core.recipe.tables import PairsConfig
from tests.oracles import AffineDenoiser, Pusher, train

MEAN, STD = 0.6, 0.3


def build(pairs: Pairs | None = None, **config: object) -> DMD2:
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    return DMD2(
        DMD2.Config(**{"levels": (5.0,), **config}),
        teacher=teacher,
        student=Pusher(-0.5, 1.0),
        pairs=pairs,
    )


@pytest.mark.slow
def test_the_student_recovers_the_teachers_mean_and_spread():
    torch.manual_seed(0)
    method = build()
    train(method, 300)
    assert method.student.mean.item() == pytest.approx(MEAN, abs=0.03)
    assert method.student.log_std.exp().item() == pytest.approx(STD, abs=0.06)


@pytest.mark.slow
def test_without_fake_score_updates_the_spread_is_lost():
    torch.manual_seed(0)
    method = build()
    method.fake_score.requires_grad_(False)
    frozen = {"student": list(method.student.parameters())}
    optimizer = torch.optim.Adam(frozen["student"], 0.02)
    for step in range(300):
        for update in method.updates(Batch.of(256), step):
            if update.role == "student":
                update.loss.backward(inputs=frozen["student"])
                optimizer.step()
                optimizer.zero_grad()
    assert abs(method.student.log_std.exp().item() - STD) > 0.15


def test_a_step_against_the_direction_moves_samples_towards_the_teacher():
    teacher, fake = AffineDenoiser(0.0, 0.5), AffineDenoiser(0.3, 0.5)  # samples shifted by +0.3
    x0 = 0.3 + 0.5 * torch.randn(512, 1, 2, 2)
    sigma = torch.full((512,), 1.0)
    x_sigma = x0 + torch.randn_like(x0)
    with torch.no_grad():
        direction = dm_direction(fake(x_sigma, sigma), teacher(x_sigma, sigma), x0)
    assert (direction > 0).all()


def test_the_direction_is_the_scores_difference_over_each_samples_distance_from_the_teacher():
    x0, teacher_x0, fake_x0 = (
        torch.randn(3, 2, 4, 5) * torch.tensor([0.1, 1, 7]).reshape(3, 1, 1, 1) for _ in "123"
    )
    found = dm_direction(fake_x0, teacher_x0, x0)
    for index in range(3):
        scale = (x0[index] - teacher_x0[index]).abs().mean()
        torch.testing.assert_close(found[index], (fake_x0[index] - teacher_x0[index]) / scale)


def test_the_surrogate_has_the_direction_as_its_gradient():
    x0 = torch.randn(4, 1, 2, 2, requires_grad=True)
    direction = torch.randn(4, 1, 2, 2)
    surrogate_loss(x0, direction).backward()
    assert torch.allclose(x0.grad, direction / x0.numel(), atol=1e-6)


def test_no_gradient_of_the_student_loss_reaches_teacher_or_fake_score():
    method = build()
    *_, last = method.updates(Batch.of(8), 0)
    last.loss.backward()
    assert last.role == "student"
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is None for p in method.fake_score.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


def test_a_student_of_two_levels_is_trained_on_its_own_intermediate_samples():
    torch.manual_seed(0)
    method = build(levels=(5.0, 1.0))
    calls, paths = [], set()
    call = method.call_student
    method.call_student = lambda x, level, cond: calls.append(level) or call(x, level, cond)
    for _ in range(20):
        calls.clear()
        method.generate(Batch.of(4))
        paths.add(tuple(calls))
    assert paths == {(5.0,), (5.0, 1.0)}
    assert method.student.sampler.sigmas == (5.0, 1.0)
    assert method.student.sampler.num_steps == 2


@pytest.mark.parametrize("levels", [(1.0, 5.0), (2.0, 2.0), (-1.0,)])
def test_levels_out_of_order_are_refused(levels):
    with pytest.raises(ConfigError, match="strictly descending"):
        DMD2.Config.parse({"levels": levels})


def test_a_level_above_the_teachers_highest_is_refused():
    with pytest.raises(ConfigError, match="level 50 is above the teacher's highest, 10"):
        build(levels=(50.0,))


def test_only_the_students_own_update_builds_a_graph_through_the_student():
    method, grads = build(critic_steps=3), []
    call = method.call_student
    method.call_student = lambda x, level, cond: grads.append(torch.is_grad_enabled()) or call(x, level, cond)
    list(method.updates(Batch.of(4), 0))
    assert grads == [False, False, False, True]


def test_a_gan_needs_pictures_and_so_does_training_on_noised_data():
    assert "discriminator" in DMD2.columns(DMD2.Config(gan_weight=0.1))["x0"]
    assert "noised_data" in DMD2.columns(DMD2.Config(rollout="noised_data"))["x0"]
    assert DMD2.columns(DMD2.Config()) == {}


def seen_by(module: torch.nn.Module, seen: list) -> None:
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))


def test_teacher_fake_score_and_discriminator_read_one_noised_sample():
    torch.manual_seed(0)
    method, teacher_saw, fake_saw = build(gan_weight=0.5, critic_steps=1), [], []
    updates = method.updates(Batch.of(8, torch.randn(8, 1, 2, 2)), 0)
    next(updates)
    seen_by(method.teacher, teacher_saw)
    seen_by(method.fake_score.denoiser, fake_saw)
    next(updates)
    assert len(teacher_saw) == len(fake_saw) == 1
    assert torch.equal(teacher_saw[0], fake_saw[0])


def test_the_gan_pulls_the_student_through_the_trunk_by_its_weight():
    gradients = []
    for weight in (0.25, 0.5):
        torch.manual_seed(0)
        method = build(gan_weight=weight)
        x0 = torch.full((8, 1, 2, 2), 0.3, requires_grad=True)
        torch.manual_seed(1)
        loss, _ = method.student_loss(x0, Batch.of(8), 0)
        gradients.append(torch.autograd.grad(loss, x0)[0])
    torch.manual_seed(1)
    sigma = method.sample_sigma(x0)
    _, logits = method.fake_score.with_logits(add_noise(x0, sigma), sigma, {})
    alone = torch.autograd.grad(F.softplus(-logits).mean(), x0)[0]
    assert alone.abs().max() > 1e-4
    assert torch.allclose(gradients[1] - gradients[0], 0.25 * alone, atol=1e-7)


@pytest.mark.parametrize(
    ("rollout", "mean", "spread"), [("noised_data", 7.0, 0.5), ("simulated", -0.75, 1.25**0.5)]
)
def test_later_levels_are_fed_the_students_own_samples_unless_told_otherwise(rollout, mean, spread):
    """Of z = 0: -1/2, then -1/2 + 2 n, of which the student makes -3/4 + n, and with the last noise 1/2 n' more."""
    torch.manual_seed(0)
    method = build(levels=(5.0, 2.0, 0.5), rollout=rollout)
    x = method.roll_out(
        torch.zeros(512, 1, 2, 2), method.levels[:3], Batch.of(512, torch.full((512, 1, 2, 2), 7.0))
    )
    assert x.mean().item() == pytest.approx(mean, abs=0.1)
    assert x.std().item() == pytest.approx(spread, rel=0.05)
    assert not x.requires_grad


def test_the_two_scores_are_compared_on_the_asked_part_of_the_teachers_grid():
    torch.manual_seed(0)
    method = build(min_level=0.3, max_level=0.7)
    low, high = method.teacher.schedule.sigma_at(torch.tensor([0.3, 0.7]))
    sigma = method.sample_sigma(torch.zeros(2000))
    assert sigma.min().item() == pytest.approx(low.item(), rel=0.02)
    assert sigma.max().item() == pytest.approx(high.item(), rel=0.02)


def test_the_fake_score_learns_samples_and_its_head_tells_them_from_pictures_at_the_same_levels():
    method, x0, real = (
        build(gan_weight=0.5, discriminator_weight=0.3),
        torch.zeros(3, 1, 2, 2),
        torch.ones(3, 1, 2, 2),
    )
    torch.manual_seed(1)
    loss = method.fake_score_loss(x0, Batch.of(3, real))
    torch.manual_seed(1)
    sigma = method.sample_sigma(x0)
    noise = torch.randn(6, 1, 2, 2)
    x_sigma = torch.cat([x0, real]) + sigma.repeat(2).reshape(-1, 1, 1, 1) * noise
    predicted, logits = method.fake_score.with_logits(x_sigma, sigma.repeat(2), {})
    weight = method.teacher.schedule.loss_weight(sigma)
    denoising = (weight * (predicted[:3] - x0).square().mean((1, 2, 3))).mean()
    told_apart = F.softplus(logits[:3]).mean() + F.softplus(-logits[3:]).mean()
    torch.testing.assert_close(loss, denoising + 0.3 * told_apart)


def test_real_pictures_have_the_conditions_of_the_samples_beside_them():
    labels = torch.tensor([4, 7, 9])
    batch = Batch.of(3, torch.ones(3, 1, 2, 2), {"class_label": labels})
    _, sigma, cond = build().with_real(torch.zeros(3, 1, 2, 2), torch.tensor([1.0, 2.0, 3.0]), batch)
    assert sigma.tolist() == [1.0, 2.0, 3.0] * 2
    assert cond["class_label"].tolist() == [4, 7, 9] * 2


def test_the_teacher_alone_is_guided_and_by_the_recipes_scale():
    method, scales = build(guidance=3.0), []
    guided = method.teacher.guided
    method.teacher.guided = lambda x, s, c, guidance: scales.append(guidance) or guided(x, s, c, guidance)
    list(method.updates(Batch.of(4), 0))
    assert scales == [3.0]


def test_pure_noise_is_scaled_as_the_students_sampler_says(tmp_path):
    """Not by the level: a variance-preserving model's factor is another one."""
    method, seen = build(teacher_pairs(tmp_path), levels=(2.0,)), []
    assert method.student.sampler.noise_scale == 2.0
    method.student.sampler = method.student.sampler.model_copy(update={"noise_scale": 7.0})
    seen_by(method.student, seen)
    method.generate(Batch.of(500))
    method.regression_loss(500)
    assert [x.std().item() for x in seen] == pytest.approx([7.0, 7.0], rel=0.1)


def teacher_pairs(folder: Path) -> Pairs:
    source = build_source({"name": "digits", "labelled": False})
    return build_pairs(AffineDenoiser(MEAN, STD), source, PairsConfig(count=256, num_steps=32), folder)


def test_the_regression_start_learns_the_teachers_pairs(tmp_path):
    torch.manual_seed(0)
    pairs = teacher_pairs(tmp_path)
    method = build(pairs, regression_steps=100, levels=(2.0,))
    before = copy.deepcopy(method.fake_score.state_dict())
    train(method, 100, lr=0.1)
    every = pairs.at(torch.arange(len(pairs)))
    slope = ((every.z - every.z.mean()) * every.x0).sum() / (every.z - every.z.mean()).square().sum()
    assert method.student.log_std.exp().item() == pytest.approx(slope.item(), abs=0.02)
    assert method.student.mean.item() == pytest.approx((every.x0 - slope * every.z).mean().item(), abs=0.02)
    assert all(torch.equal(value, before[name]) for name, value in method.fake_score.state_dict().items())
    assert {update.role for update in method.updates(Batch.of(4), 100)} == {"fake_score", "student"}


def test_pairs_without_a_regression_change_nothing(tmp_path):
    results = []
    for pairs in (None, teacher_pairs(tmp_path)):
        torch.manual_seed(0)
        method = build(pairs)
        train(method, 3)
        results.append(method.student.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_regression_without_pairs_is_refused():
    with pytest.raises(ConfigError, match=r"add a \[pairs\] table"):
        build(regression_steps=5)


class Elsewhere(DMD2):
    """A variant whose target lies on the other side from step 10 on, and which counts only half its samples."""

    def target(self, step):
        return AffineDenoiser(-5.0, STD).requires_grad_(False) if step >= 10 else self.teacher

    def weigh(self, direction, logits, sigma):
        return direction * (torch.arange(len(direction)) % 2)[:, None, None, None]


def test_a_variant_sets_the_target_and_the_weight_of_each_sample():
    def gradient(step: int) -> torch.Tensor:
        torch.manual_seed(0)
        x0 = torch.zeros(8, 1, 2, 2, requires_grad=True)
        loss, _ = method.student_loss(x0, Batch.of(8), step)
        return torch.autograd.grad(loss, x0)[0]

    method = Elsewhere(
        DMD2.Config(levels=(5.0,)),
        teacher=AffineDenoiser(5.0, STD).requires_grad_(False),
        student=Pusher(0.0, 1.0),
    )
    method.fake_score.denoiser.mean.data.fill_(0.0)
    early, late = gradient(9), gradient(10)
    assert (early[1::2] < 0).all()
    assert (late[1::2] > 0).all()
    assert (early[::2] == 0).all()

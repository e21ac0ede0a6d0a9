"""DMD2 against an exact oracle: a Gaussian teacher, whose score is known in closed form."""

from __future__ import annotations

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.losses.matching import dm_direction, surrogate_loss
from distill_core.method import Batch
from distill_core.methods.diffusion.dmd2 import DMD2
from tests.oracles import AffineDenoiser, Pusher, train

MEAN, STD = 0.6, 0.3


class NoImages:
    shape = None


def build(**config: object) -> DMD2:
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    return DMD2(
        DMD2.Config(**{"levels": (5.0,), **config}),
        teacher=teacher,
        student=Pusher(-0.5, 1.0),
        data=NoImages(),
    )


def test_the_student_recovers_the_teachers_mean_and_spread():
    torch.manual_seed(0)
    method = build()
    train(method, 300)
    assert method.student.mean.item() == pytest.approx(MEAN, abs=0.03)
    assert method.student.log_std.exp().item() == pytest.approx(STD, abs=0.06)


def test_without_fake_score_updates_the_spread_is_lost():
    torch.manual_seed(0)
    method = build()
    method.fake_score.requires_grad_(False)
    frozen = {"student": list(method.student.parameters())}
    optimizer = torch.optim.Adam(frozen["student"], 0.02)
    for step in range(300):
        for update in method.updates(Batch(256), step):
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


def test_the_surrogate_has_the_direction_as_its_gradient():
    x0 = torch.randn(4, 1, 2, 2, requires_grad=True)
    direction = torch.randn(4, 1, 2, 2)
    surrogate_loss(x0, direction).backward()
    assert torch.allclose(x0.grad, direction / x0.numel(), atol=1e-6)


def test_no_gradient_of_the_student_loss_reaches_teacher_or_fake_score():
    method = build()
    *_, last = method.updates(Batch(8), 0)
    last.loss.backward()
    assert last.role == "student"
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is None for p in method.fake_score.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


def test_a_student_of_two_levels_is_trained_on_its_own_intermediate_samples():
    torch.manual_seed(0)
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    method = DMD2(DMD2.Config(levels=(5.0, 1.0)), teacher=teacher, student=Pusher(-0.5, 1.0), data=NoImages())
    seen = []
    call = method.call_student
    method.call_student = lambda x, level, cond: seen.append((level, x.requires_grad)) or call(x, level, cond)
    for _ in range(20):
        method.generate(Batch(4))
    assert {level for level, _ in seen} == {5.0, 1.0}
    assert method.student.sampler.sigmas == (5.0, 1.0)
    assert method.student.sampler.num_steps == 2


def test_the_gan_needs_images_and_says_so_before_training():
    with pytest.raises(ConfigError, match="gan_weight needs real images"):
        build(gan_weight=0.1)


@pytest.mark.parametrize("levels", [(1.0, 5.0), (2.0, 2.0), (-1.0,)])
def test_levels_out_of_order_are_refused(levels):
    with pytest.raises(ConfigError, match="strictly descending"):
        DMD2.Config.parse({"levels": levels})


def test_a_level_above_the_teachers_highest_is_refused():
    with pytest.raises(ConfigError, match="level 50 is above the teacher's highest, 10"):
        build(levels=(50.0,))

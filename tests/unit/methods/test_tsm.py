"""TSM: a student of another size takes over what its teacher sees, above all at the student's own levels."""

from __future__ import annotations

import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion.tsm import TSM
from distill_core.recipe.tables import EvaluateConfig
from tests.oracles import AffineDenoiser

MEAN, STD = 0.6, 0.3


class Twos:
    """Pictures (1, 2, 2) for the evaluation."""

    def all(self, limit: int) -> Batch:
        return Batch.of(limit, torch.linspace(-1, 1, 4 * limit).reshape(limit, 1, 2, 2))


class Guided(AffineDenoiser):
    """Its guided answer is `guidance` times the plain one."""

    def guided(self, x_sigma, sigma, cond, guidance):
        return guidance * self(x_sigma, sigma)


def build(teacher: AffineDenoiser | None = None, **config: object) -> TSM:
    teacher = (teacher or AffineDenoiser(MEAN, STD)).requires_grad_(False)
    settings = {"levels": (5.0,), **config}
    return TSM(TSM.Config(**settings), teacher=teacher, student=AffineDenoiser(-0.5, 1.0), data=Twos())


def fit(method: TSM, steps: int = 300, lr: float = 0.02) -> None:
    optimizer = torch.optim.Adam(method.student.parameters(), lr)
    for step in range(steps):
        (update,) = method.updates(Batch.of(64, torch.randn(64, 1, 2, 2)), step)
        update.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_student_becomes_what_the_teacher_is_whatever_the_pictures():
    torch.manual_seed(0)
    method = build()
    before = method.figures(EvaluateConfig())["own_level_error"]
    fit(method)
    assert method.student.mean.item() == pytest.approx(MEAN, abs=0.02)
    assert method.student.log_std.exp().item() == pytest.approx(STD, abs=0.02)
    assert method.figures(EvaluateConfig())["own_level_error"] < 1e-3 * before


def test_the_error_is_relative_to_the_teachers_own_answers():
    """The teacher says about 0.6 everywhere and the student -0.5 + x kept by 1 / 26: in closed form."""
    method = build()
    batch = method.data.all(300)
    torch.manual_seed(0)
    x_sigma = batch.x0 + 5.0 * torch.randn_like(batch.x0)
    sigma = torch.full((300,), 5.0)
    student, teacher = method.student(x_sigma, sigma), method.teacher(x_sigma, sigma)
    expected = ((student - teacher).square().mean() / teacher.square().mean()).item()
    found = method.figures(EvaluateConfig(num_samples=300))["own_level_error"]
    assert found == pytest.approx(expected, rel=0.05)
    assert abs(found - ((student - teacher).square().mean() / student.square().mean()).item()) > 0.2 * found


def test_guidance_is_taken_over_too():
    torch.manual_seed(0)
    method = build(Guided(0.25, STD), guidance=3.0, own_share=1.0)
    fit(method)
    assert method.student.mean.item() == pytest.approx(
        0.75, abs=0.05
    )  # at a high level the mean is all there is


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.46, 0.54), (1.0, 1.0, 1.0)])
def test_so_many_items_are_noised_to_the_students_own_levels(share, low, high):
    torch.manual_seed(0)
    method = build(own_share=share, levels=(5.0, 1.0))
    sigma = method.sample_sigma(4000)
    own = [(sigma == level).float().mean().item() for level in (5.0, 1.0)]
    assert low <= sum(own) <= high
    assert abs(own[0] - own[1]) < 0.05
    schedule = method.teacher.schedule
    assert schedule.sigma_min <= sigma.min() <= sigma.max() <= schedule.sigma_max * 1.0001


def test_the_evaluation_leaves_the_random_stream_alone_and_repeats():
    method = build()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = method.figures(EvaluateConfig(num_samples=8))
    assert torch.equal(torch.rand(3), expected)
    assert method.figures(EvaluateConfig(num_samples=8)) == first


def test_a_level_above_the_teachers_highest_is_refused():
    with pytest.raises(ConfigError, match="level 50 is above the teacher's highest, 10"):
        build(levels=(50.0,))


def test_pictures_are_asked_for():
    assert "noised pictures" in TSM.columns(TSM.Config())["x0"]
    assert build_source({"name": "classes", "num_classes": 2}).shape is None

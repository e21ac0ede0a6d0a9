"""f-distill against calculus: every weight is f''(r) r^2, and the gradient it gives is that of the divergence."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch.distributions import Normal

from distill_core.errors import ConfigError
from distill_core.losses.adversarial import approximate_r1, discriminator_loss
from distill_core.losses.divergence import (
    Divergence,
    TimeBinNormalizer,
    batch_normalised,
    density_ratio,
    divergence_weight,
)
from distill_core.method import Batch
from distill_core.methods.diffusion.dmd2 import DMD2
from distill_core.methods.diffusion.f_distill import FDistill
from tests.oracles import AffineDenoiser, Pusher

F = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (1 + r) * ((1 + r) / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (1 + r) * (1 + r).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / r,
}


def build(cls: type[DMD2] = FDistill, **config: object) -> DMD2:
    torch.manual_seed(0)
    return cls(
        cls.Config(**{"levels": (5.0,), "critic_steps": 1, **config}),
        teacher=AffineDenoiser(0.6, 0.3).requires_grad_(False),
        student=Pusher(-0.5, 1.0),
    )


def step(method: DMD2, steps: int, size: int = 32) -> list[str]:
    """SGD on every role in the order that the method asks for; that order."""
    order, optimizers = [], {}
    for number in range(steps):
        torch.manual_seed(100 + number)
        batch = Batch.of(size, 0.6 + 0.3 * torch.randn(size, 1, 2, 2))
        for update in method.updates(batch, number):
            parameters = list(getattr(method, update.role).parameters())
            update.loss.backward(inputs=parameters)
            optimizer = optimizers.setdefault(update.role, torch.optim.Adam(parameters, 0.01))
            optimizer.step()
            optimizer.zero_grad()
            order.append(update.role)
    return order


@pytest.mark.parametrize("name", get_args(Divergence))
def test_the_weight_is_the_second_derivative_of_f_times_r_squared(name):
    r = torch.linspace(0.05, 20, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert torch.allclose(divergence_weight(name, r), second * r**2, rtol=1e-9)


@pytest.mark.parametrize("name", get_args(Divergence))
def test_the_weighted_score_difference_is_the_gradient_of_the_divergence(name):
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    p, q = Normal(0.0, 1.0).log_prob(x), Normal(mean, 0.9).log_prob(x)
    (exact,) = torch.autograd.grad(torch.trapezoid(q.exp() * F[name]((p - q).exp()), x), mean)
    h = divergence_weight(name, (p - q).exp())
    score_p, score_q = -x, -(x - mean) / 0.9**2  # x = mean + 0.9 z, so dx/dmean = 1
    ours = torch.trapezoid(q.exp() * h * (score_q - score_p), x)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_ratio_is_the_exponential_of_the_logit_within_bounds_and_carries_no_gradient():
    logits = torch.tensor([0.0, 1.0, -50.0, 50.0], requires_grad=True)
    ratio = density_ratio(logits, 0.1, 20.0)
    assert torch.allclose(ratio, torch.tensor([1.0, 2.718282, 0.1, 20.0]))
    far = density_ratio(torch.tensor([-200.0, 200.0]), 0.0, float("inf"))  # no bound of ours: still a number
    assert torch.allclose(far, torch.tensor([-10.0, 10.0]).exp())
    assert not ratio.requires_grad


def test_every_noise_level_has_its_own_running_mean():
    normalizer = TimeBinNormalizer(torch.tensor([0.0, 1.0, 2.0, 3.0]), decay=0.75)
    low, high = torch.tensor([0.5, 0.5]), torch.tensor([2.5])
    first = normalizer(torch.tensor([1.0, 3.0, 8.0]), torch.cat([low, high]))
    assert torch.allclose(first, torch.tensor([0.5, 1.5, 1.0]), atol=1e-5)
    assert torch.allclose(normalizer.means, torch.tensor([2.0, 0.0, 8.0]))
    normalizer(torch.tensor([4.0, 8.0]), low)
    assert torch.allclose(normalizer.means, torch.tensor([0.75 * 2 + 0.25 * 6, 0.0, 8.0]))
    outside = normalizer(torch.tensor([8.0]), torch.tensor([9.0]))  # belongs to the last bin
    assert outside.item() == pytest.approx(1.0, abs=1e-5)


def test_the_weights_of_a_batch_have_mean_one():
    weight = batch_normalised(torch.tensor([1.0, 2.0, 5.0, 8.0]))
    assert weight.tolist() == pytest.approx([0.25, 0.5, 1.25, 2.0])
    assert (weight[3] / weight[0]).item() == pytest.approx(8.0)


def test_forward_kl_counts_a_sample_that_the_teacher_likes_more_by_its_ratio():
    method = build(divergence="forward_kl", ratio_bins=1)
    direction, logits = torch.ones(4, 1, 2, 2), torch.tensor([0.0, 1.0, 2.0, -1.0])
    weighted = method.weigh(direction, logits, torch.ones(4))[:, 0, 0, 0]
    assert weighted.mean().item() == pytest.approx(1.0)
    assert torch.allclose((weighted / weighted[0]).log(), logits, atol=1e-5)


@pytest.mark.parametrize("gan_weight", [0.0, 0.5])
def test_reverse_kl_is_dmd2_bit_for_bit(gan_weight):
    ours, host = (
        build(cls, gan_weight=gan_weight, **extra)
        for cls, extra in ((FDistill, {"divergence": "reverse_kl"}), (DMD2, {}))
    )
    assert step(ours, 5) == step(host, 5)
    for role in host.roles:
        theirs = getattr(host, role).state_dict()
        assert all(
            torch.equal(value, theirs[name]) for name, value in getattr(ours, role).state_dict().items()
        )


def test_another_divergence_moves_the_student_elsewhere():
    ends = []
    for divergence in ("reverse_kl", "forward_kl"):
        method = build(divergence=divergence, gan_weight=0.5)
        step(method, 10)
        ends.append(method.student.mean.item())
    assert abs(ends[0] - ends[1]) > 1e-5


@pytest.mark.parametrize("gan_weight", [0.0, 0.5])
def test_heads_on_the_teachers_features_are_a_role_of_their_own(gan_weight):
    method = build(features="teacher", divergence="forward_kl", gan_weight=gan_weight)
    assert method.roles == ("fake_score", "discriminator", "student")
    assert method.fake_score.head is None
    teacher = copy.deepcopy(method.teacher.state_dict())
    head = copy.deepcopy(method.discriminator.state_dict())
    assert step(method, 2) == ["fake_score", "discriminator", "student"] * 2
    assert all(torch.equal(value, teacher[name]) for name, value in method.teacher.state_dict().items())
    assert any(
        not torch.equal(value, head[name]) for name, value in method.discriminator.state_dict().items()
    )


def test_the_ratio_is_read_at_the_sample_that_the_scores_see():
    method, seen = build(features="teacher", divergence="forward_kl"), []
    method.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method.fake_score.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method.student_loss(torch.randn(8, 1, 2, 2), Batch.of(8), 0)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_trained_discriminator_tells_the_true_ratio():
    method = build(features="teacher", divergence="forward_kl", min_level=0.5, max_level=0.6)
    optimizer = torch.optim.Adam(method.discriminator.parameters(), 5e-3)
    torch.manual_seed(0)
    for _ in range(150):  # student N(0, 1) against data N(0.6, 0.3^2), four pixels each
        real = 0.6 + 0.3 * torch.randn(256, 1, 2, 2)
        *_, update = method.critic_updates(torch.randn(256, 1, 2, 2), Batch.of(256, real))
        update.loss.backward(inputs=list(method.discriminator.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    sigma = method.sample_sigma(torch.zeros(512))
    x0 = torch.randn(512, 1, 2, 2)
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    spread = sigma[:, None, None, None] ** 2
    true = (
        Normal(0.6, (0.09 + spread).sqrt()).log_prob(x) - Normal(0.0, (1 + spread).sqrt()).log_prob(x)
    ).sum((1, 2, 3))
    with torch.no_grad():
        logits = method.teacher_logits(x, sigma, {})
    assert torch.corrcoef(torch.stack([logits, true.clamp(-5, 5)]))[0, 1] > 0.8
    assert (logits - true)[true > -3].abs().mean() < 0.6


def test_a_warm_up_trains_the_critics_and_leaves_the_student():
    method = build(divergence="forward_kl", gan_weight=0.5, warmup_steps=2)
    student = copy.deepcopy(method.student.state_dict())
    head = copy.deepcopy(method.fake_score.head.state_dict())
    assert step(method, 2) == ["fake_score"] * 2
    assert all(torch.equal(value, student[name]) for name, value in method.student.state_dict().items())
    assert any(
        not torch.equal(value, head[name]) for name, value in method.fake_score.head.state_dict().items()
    )
    assert {update.role for update in method.updates(Batch.of(4, torch.zeros(4, 1, 2, 2)), 2)} == {
        "fake_score",
        "student",
    }


def test_a_warm_up_begins_when_the_regression_is_done():
    method = build(divergence="forward_kl", warmup_steps=2)
    method.config = method.config.model_copy(update={"regression_steps": 3})
    names = [method.stage_of(step).name for step in range(7)]
    assert names == ["regression"] * 3 + ["warm_up"] * 2 + ["matching"] * 2


def test_the_levels_between_the_bins_are_those_where_scores_are_compared_in_equal_shares():
    method = build(divergence="forward_kl", min_level=0.2, max_level=0.8, ratio_bins=3)
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8])
    torch.testing.assert_close(method.normalizer.edges, method.teacher.schedule.sigma_at(shares))


def test_the_penalty_is_the_squared_slope_of_the_discriminator():
    torch.manual_seed(0)
    slope, x = torch.tensor([3.0, -4.0]), torch.randn(20_000, 2)
    penalty = approximate_r1(x @ slope, (x + 0.1 * torch.randn_like(x)) @ slope)
    assert penalty.item() == pytest.approx(0.1**2 * 25, rel=0.05)


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_the_penalty_reads_the_real_pictures_moved_by_its_noise(features):
    method = build(features=features, divergence="forward_kl", r1_weight=7.0, r1_noise=0.01)
    x, sigma, _ = method.with_real(
        torch.zeros(4, 1, 2, 2), torch.full((4,), 0.5), Batch.of(4, torch.ones(4, 1, 2, 2))
    )
    assert x.shape[0] == sigma.shape[0] == 12
    gap = x[8:] - x[4:8]
    assert 0 < gap.abs().max() < 0.06
    fake, real, moved = torch.randn(3, 4)
    term = method.discriminator_term(torch.cat([fake, real, moved]))
    assert torch.allclose(term, discriminator_loss(real, fake) + 7.0 * (real - moved).square().mean())
    step(method, 2)


def test_the_running_means_are_the_trainers_and_not_the_students():
    method = build(divergence="forward_kl", gan_weight=0.5)
    step(method, 3)
    state = method.state()
    assert (state["means"] > 0).any()
    assert not any("means" in name for name in method.student.state_dict())
    fresh = build(divergence="forward_kl", gan_weight=0.5)
    fresh.load_state({name: value.clone() for name, value in state.items()})
    assert torch.equal(fresh.normalizer.means, method.normalizer.means)


def test_a_ratio_needs_pictures_and_a_discriminator_that_learns():
    assert "discriminator" in FDistill.columns(FDistill.Config(divergence="forward_kl"))["x0"]
    assert FDistill.columns(FDistill.Config(divergence="reverse_kl")) == {}
    with pytest.raises(ConfigError, match="leaves the density ratio untrained"):
        FDistill.Config.parse({"divergence": "forward_kl", "discriminator_weight": 0.0})

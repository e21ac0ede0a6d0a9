"""BOOT against a Gaussian teacher: a student with a free signal at each place of the path finds the teacher's walk."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.levels import expand
from distill_core.method import Batch
from distill_core.methods import needs
from distill_core.methods.diffusion.boot import BOOT
from tests.oracles import AffineDenoiser

MEAN, STD, JUMPS = 0.3, 0.25, 6


class Signals(AffineDenoiser):
    """y = m_i + s_i eps at the place i that a level stands for; what a network can say of a Gaussian's signal."""

    def __init__(self, labels) -> None:
        super().__init__(MEAN, STD)
        self.labels = torch.tensor(labels)
        self.values = torch.nn.Parameter(torch.tensor([[-0.3, 0.4]]).repeat(len(labels), 1))

    def forward(self, x_sigma, sigma, cond=None):
        place = (sigma[:, None] - self.labels).abs().argmin(1)
        mean, std = self.values[place].unbind(1)
        return expand(mean, x_sigma) + expand(std, x_sigma) * x_sigma / expand(sigma, x_sigma)


def method_of(**config: object) -> BOOT:
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    config = BOOT.Config.parse({"num_jumps": JUMPS, **config})
    labels = BOOT(config, teacher=teacher, student=AffineDenoiser(MEAN, STD)).labels
    return BOOT(config, teacher=teacher, student=Signals(labels))


def trained(method: BOOT, steps: int = 1200, lr: float = 0.03) -> torch.Tensor:
    optimizer = torch.optim.Adam([method.student.values], lr)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        (update,) = method.updates(Batch.of(128), step)
        update.loss.backward(inputs=[method.student.values])
        optimizer.step()
        optimizer.zero_grad()
    return method.student.values.detach()


def walk(method: BOOT) -> torch.Tensor:
    """(m_i, s_i) of the signal on the teacher's walk: affine in eps at every place, from its first x0 on."""

    def denoised(mean: float, std: float, level: float) -> tuple[float, float]:
        share = STD**2 / (STD**2 + level**2)
        return MEAN + share * (mean - MEAN), share * std

    signal = denoised(0.0, method.levels[0], method.levels[0])
    found = [signal]
    for t, s in zip(method.levels, method.levels[1:], strict=False):
        x0 = denoised(signal[0], signal[1] + t, t)
        signal = tuple((s / t) * y + (1 - s / t) * x for y, x in zip(signal, x0, strict=True))
        found.append(signal)
    return torch.tensor(found)


def test_the_signal_at_every_place_is_the_teacher_s_own_walk(monkeypatch):
    method = method_of()
    assert needs(BOOT) == ["teacher", "student"]
    torch.testing.assert_close(trained(method), walk(method), atol=0.02, rtol=0)
    spec = method.student.sampler
    assert spec.sigmas == (method.labels[-1],) == (method.levels[0],)


def test_the_walk_ends_near_the_ode_s_end_with_more_jumps():
    ends = [float(walk(method_of(num_jumps=count))[-1, 1]) for count in (6, 60)]
    exact = 10 * STD / (STD**2 + 100) ** 0.5
    assert abs(ends[1] - exact) < 0.2 * abs(ends[0] - exact)


def test_without_the_boundary_nothing_is_told_where_paths_begin():
    for weight, moves in ((0.0, False), (0.7, True)):
        method = method_of(boundary_weight=weight)
        torch.manual_seed(0)
        (update,) = method.updates(Batch.of(64), 0)
        update.loss.backward(inputs=[method.student.values])
        assert bool(method.student.values.grad[0].abs().sum() > 0) == moves
        assert ("boundary" in update.metrics) == moves


def test_a_step_weighs_more_the_less_it_changes_up_to_the_floor():
    method = method_of(floor=0.6)
    eps, place = torch.zeros(JUMPS, 1, 2, 2), torch.arange(JUMPS)
    _, weight = method.target(eps, place, {})
    shares = [1 - s / t for t, s in zip(method.levels, method.levels[1:], strict=False)]
    assert weight.tolist() == pytest.approx([1 / max(share, 0.6) for share in shares], rel=1e-4)
    assert min(shares) < 0.6 < max(shares)


def test_heun_looks_at_both_ends_of_a_step():
    torch.manual_seed(0)
    eps, place = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 4, 5])
    method, other = method_of(), method_of(solver="heun")
    y, _ = method.target(eps, place, {})
    both, _ = other.target(eps, place, {})
    levels = torch.tensor(method.levels)
    t, s = levels[place], levels[place + 1]
    x = method.signal(eps, place, {}).detach() + expand(t, eps) * eps
    x0 = method.teacher(x, t)
    landed = x0 + expand(s / t, eps) * (x - x0)
    x0 = (x0 + method.teacher(landed, torch.where(s > 0, s, t))) / 2
    expected = x0 + expand(s / t, eps) * (x - x0) - expand(s, eps) * eps
    torch.testing.assert_close(both, expected)
    assert float((both - y).abs().max()) > 1e-3

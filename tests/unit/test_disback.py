"""DisBack's target: snapshots by distance, walked back to the teacher, resumable at any step."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.losses.matching import dm_direction
from distill_core.method import Batch
from distill_core.methods.diffusion.disback import DisBack
from distill_core.methods.diffusion.dmd2 import DMD2
from tests.oracles import AffineDenoiser, Pusher

RECORD, NODE = 60, 4


class Run:
    """A method with its optimisers, stepped as the loop does."""

    def __init__(self, cls: type[DMD2] = DisBack, lr: float = 0.05, **config: object) -> None:
        torch.manual_seed(0)
        self.method = cls(
            cls.Config(**{"levels": (5.0,), "critic_steps": 1, **config}),
            teacher=AffineDenoiser(0.6, 0.3).requires_grad_(False),
            student=Pusher(-1.5, 1.0),
        )
        self.optimizers = {
            role: torch.optim.SGD(getattr(self.method, role).parameters(), lr) for role in self.method.roles
        }

    def steps(self, first: int, last: int) -> list[str]:
        order = []
        for step in range(first, last):
            torch.manual_seed(100 + step)
            for update in self.method.updates(Batch.of(32), step):
                update.loss.backward(inputs=list(getattr(self.method, update.role).parameters()))
                self.optimizers[update.role].step()
                self.optimizers[update.role].zero_grad()
                order.append(update.role)
        return order

    def weights(self) -> list[torch.Tensor]:
        return [
            p.detach().clone() for role in self.method.roles for p in getattr(self.method, role).parameters()
        ]


def recorded(**config: object) -> Run:
    run = Run(**{"num_nodes": 6, "record_steps": RECORD, "node_steps": NODE, "node_distance": 0.1, **config})
    assert run.steps(0, RECORD) == ["fake_score"] * RECORD
    return run


def probe(method: DisBack, target: torch.nn.Module, of: torch.nn.Module | None = None) -> torch.Tensor:
    """The direction on one fixed batch."""
    torch.manual_seed(7)
    x0 = -1.5 + torch.randn(256, 1, 2, 2)
    sigma = method.sample_sigma(x0)
    x_sigma = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    with torch.no_grad():
        return dm_direction((of or method.fake_score)(x_sigma, sigma, {}), target(x_sigma, sigma, {}), x0)


def test_the_student_rests_while_the_degradation_is_recorded():
    run = recorded()
    assert run.method.student.mean.item() == -1.5
    assert len(run.method.nodes) >= 3
    assert {role for role in run.steps(RECORD, RECORD + 1)} == {"fake_score", "student"}


def test_the_nodes_lead_from_the_teacher_to_the_student_in_even_distances():
    method = recorded(lr=0.01, num_nodes=12).method
    means = [0.6, *(float(node["mean"]) for node in method.nodes), method.fake_score.denoiser.mean.item()]
    assert means == sorted(means, reverse=True)
    points = [method.teacher, *(copy.deepcopy(method.node(number)) for number in range(len(method.nodes)))]
    gaps = [probe(method, a, of=b).abs().mean().item() for a, b in zip(points, points[1:])]
    assert min(gaps) > 0.7 * method.distance  # the probe's batch is another
    assert max(gaps) < 2 * method.distance


def test_too_many_nodes_are_thinned_and_their_distance_doubled():
    method = recorded(num_nodes=3, node_distance=0.02).method
    assert 1 <= len(method.nodes) <= 3
    assert method.distance > 0.02


def at(mean: float) -> dict[str, torch.Tensor]:
    return AffineDenoiser(mean, 0.3).state_dict()


def test_of_too_many_nodes_every_second_stays_and_the_farthest_of_all():
    method = Run(num_nodes=3, node_distance=0.01).method
    method.nodes = [at(0.4), at(0.2), at(0.0)]
    method.fake_score.denoiser.load_state_dict(at(-0.9))
    method.record(Batch.of(64), last=False)
    assert [round(float(node["mean"]), 3) for node in method.nodes] == [0.2, -0.9]


@pytest.mark.parametrize(("share", "kept"), [(0.7, 2), (0.4, 1)])
def test_a_last_node_nearer_than_half_the_distance_is_dropped(share, kept):
    method = Run(num_nodes=6).method
    method.nodes = [at(0.2), at(-0.5)]
    method.fake_score.denoiser.load_state_dict(at(-0.7))
    method.distance = probe(method, method.node(1)).abs().mean().item() / share
    method.record(Batch.of(512), last=True)
    assert len(method.nodes) == kept


def test_every_switch_changes_the_direction_and_leaves_it_a_length():
    method = recorded().method
    switches = [RECORD + NODE * turn for turn in range(len(method.nodes) + 1)]
    before = None
    for step in switches:
        direction = probe(method, method.target(step))
        assert direction.norm() > 1e-2
        assert torch.equal(direction, probe(method, method.target(step + NODE - 1)))
        assert before is None or (direction - before).abs().mean() > 1e-2
        before = direction
    assert method.target(switches[-1]) is method.teacher
    assert method.target(10**6) is method.teacher


def test_the_first_target_is_the_node_nearest_the_student():
    method = recorded().method
    assert float(method.target(RECORD).mean) == float(method.nodes[-1]["mean"])
    assert float(method.target(RECORD + NODE).mean) == float(method.nodes[-2]["mean"])


def test_without_nodes_it_is_dmd2_bit_for_bit():
    ours, host = Run(num_nodes=0, record_steps=3), Run(DMD2)
    assert ours.steps(0, 8) == host.steps(0, 8)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights(), host.weights(), strict=True))


def test_a_degradation_that_never_moves_leaves_the_host():
    assert recorded(node_distance=1e6).method.nodes == []


@pytest.mark.parametrize("pause", [RECORD // 2, RECORD, RECORD + NODE + 1])
def test_a_resumed_run_walks_the_same_nodes_bit_for_bit(pause):
    config = {"num_nodes": 6, "record_steps": RECORD, "node_steps": NODE, "node_distance": 0.1}
    straight = Run(**config)
    straight.steps(0, RECORD + 20)
    first, second = Run(**config), Run(**config)
    first.steps(0, pause)
    for role in first.method.roles:
        getattr(second.method, role).load_state_dict(getattr(first.method, role).state_dict())
    second.method.load_state({name: value.clone() for name, value in first.method.state().items()})
    second.steps(pause, RECORD + 20)
    assert all(torch.equal(a, b) for a, b in zip(straight.weights(), second.weights(), strict=True))
    assert straight.method.state().keys() == second.method.state().keys()


def test_a_node_whose_weights_do_not_fit_is_an_error_and_not_the_teacher():
    method = recorded().method
    method.nodes[-1] = {"fake_unet.mean": method.nodes[-1]["mean"]}
    with pytest.raises(RuntimeError, match="Missing key"):
        method.target(RECORD)

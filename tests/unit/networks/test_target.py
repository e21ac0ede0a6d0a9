"""The target network follows the student once a step, and shares a LoRA student's base."""

from __future__ import annotations

import torch

from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.target import TargetNetwork
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from tests.helpers import TINY_NETWORKS
from tests.oracles import AffineDenoiser


def moved(student, by):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += by


def test_the_target_moves_by_its_share_once_for_each_change_of_the_student():
    student = AffineDenoiser(0.3, 1.0)
    target = TargetNetwork(student, decay=0.9)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    moved(student, 0.7)
    start = {name: value.clone() for name, value in target.state_dict().items()}
    for _ in range(2):  # as two micro-batches of one step do
        target.follow(student, 4)
    torch.testing.assert_close(target.network.mean, torch.tensor(0.3 + 0.1 * 0.7))
    moved(student, 0.2)
    target.follow(student, 5)
    torch.testing.assert_close(target.network.mean, torch.tensor(0.37 + 0.1 * (1.2 - 0.37)))
    target.load_state_dict(start)
    target.follow(student, 5)  # again, after a step that was only tried
    torch.testing.assert_close(target.network.mean, torch.tensor(0.3 + 0.1 * (1.2 - 0.3)))


def test_without_decay_the_target_is_the_student():
    student = AffineDenoiser(0.3, 1.0)
    target = TargetNetwork(student, decay=0.0)
    moved(student, 0.7)
    target.follow(student, 0)
    assert torch.equal(target.network.mean, student.mean)


def test_of_a_lora_student_only_the_factors_are_copied():
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=TINY_NETWORKS["DiTTransformer2DModel"])
    base = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    student = LoraDenoiser(base, LoraConfig(rank=2, alpha=3.0, targets="all-linear"))
    target = TargetNetwork(student, decay=0.25)
    moved(student, 0.1)
    target.follow(student, 0)
    one, two = next(student.parameters()), next(target.parameters())
    assert one.data_ptr() != two.data_ptr()
    assert not torch.equal(one, two)
    inside = [next(model.adapted.network.pos_embed.proj.parameters()) for model in (student, target.network)]
    assert inside[0].data_ptr() == inside[1].data_ptr()

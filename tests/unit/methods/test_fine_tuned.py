"""Fine-tuning moves a copy of its teacher towards other data, and keeps its null condition."""

from __future__ import annotations

import copy

import torch

from distill_core.method import Batch
from distill_core.methods.pretrain.fine_tuned import Config, FineTuned
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS


def method_of(**config):
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=TINY_NETWORKS["DiTTransformer2DModel"])
    teacher = build_denoiser(network, parameterisation="flow", shape=(1, 8, 8), num_classes=3)
    student = copy.deepcopy(teacher).requires_grad_(True)
    return FineTuned(Config(**config), teacher=teacher.requires_grad_(False), student=student)


def test_the_copy_comes_nearer_to_new_data_and_the_teacher_stays():
    method = method_of(label_dropout=0.3)
    before = copy.deepcopy(method.teacher.state_dict())
    x0 = torch.linspace(-0.7, 0.8, 64).reshape(1, 1, 8, 8).expand(24, 1, 8, 8)
    cond = {"class_label": torch.arange(24) % 3}
    optimizer = torch.optim.Adam(method.student.parameters(), 3e-3)
    for step in range(40):
        torch.manual_seed(step)
        (update,) = method.updates(Batch.of(24, x0, cond), step)
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
    x, sigma = x0 + 0.6 * torch.randn(24, 1, 8, 8), torch.full((24,), 0.6)
    with torch.no_grad():
        for asked in (cond, method.student.null_cond(24)):
            errors = [(one(x, sigma, asked) - x0).square().mean() for one in (method.student, method.teacher)]
            assert errors[0] < 0.5 * errors[1]
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())

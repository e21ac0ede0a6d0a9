"""YONOS-SR: targets of a teacher that is shown more, stages that hand over, direct training beside."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.diffusion.super_resolution import LOW_RESOLUTION, shrink
from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion.yonos import Config, Yonos
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = NetworkConfig(name="UNet2DModel", args=TINY_NETWORKS["UNet2DModel"])
    teacher = build_denoiser(
        network, parameterisation="v", shape=(1, 16, 16), num_classes=None, low_resolution=2
    )
    return teacher.requires_grad_(False)


def made(teacher, **config):
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Yonos(Config(**{"factors": (4, 8), **config}), teacher=teacher, student=student)


@pytest.fixture
def x0():
    torch.manual_seed(1)
    return torch.randn(5, 1, 16, 16).clamp(-1, 1)


def watched(model, calls, name):
    """Note the name, x and condition of every call of a model."""
    model.register_forward_pre_hook(lambda _module, inputs: calls.append((name, inputs[0], inputs[2])))


def test_student_and_teacher_see_one_noised_picture_and_the_teacher_a_larger_condition(teacher, x0):
    method, calls = made(copy.deepcopy(teacher)), []
    watched(method.teacher, calls, "teacher")
    watched(method.student, calls, "student")
    (update,) = method.updates(Batch.of(5, x0), 0)
    (first, x, shown), (second, same, smaller) = calls
    assert (first, second) == ("teacher", "student")
    assert torch.equal(x, same)
    torch.testing.assert_close(shown[LOW_RESOLUTION], shrink(x0, 2))
    torch.testing.assert_close(smaller[LOW_RESOLUTION], shrink(x0, 4))
    assert not torch.equal(x, x0)
    update.loss.backward()
    assert any(value.grad is not None for value in method.student.parameters())
    assert all(value.grad is None for value in method.teacher.parameters())


def test_a_target_is_the_answer_to_the_picture_that_is_less_small(teacher, x0):
    method = made(teacher)
    x, sigma = x0 + 0.3, torch.tensor([0.1, 0.5, 1.3, 4.0, 9.0])
    torch.testing.assert_close(
        method.target(x, sigma, x0), teacher(x, sigma, {LOW_RESOLUTION: shrink(x0, 2)})
    )
    direct = made(teacher, distil=False, factors=(8,))
    assert torch.equal(direct.target(x, sigma, x0), x0)


def test_the_next_stage_learns_from_the_student_before_it(teacher, x0):
    method = made(teacher)
    stages = method.stages(method.config, 31)
    assert [(stage.name, stage.steps, stage.restart) for stage in stages] == [
        ("factor_4", 15, False),
        ("factor_8", 15, True),
    ]
    assert method.student.cond.factor == 4
    with torch.no_grad():
        for value in method.student.parameters():
            value += 0.05  # what the first stage learned
    method.enter(stages[1])
    assert method.student.cond.factor == 8
    assert method.student.card().cond.factor == 8
    x, sigma = x0 + 0.3, torch.full((5,), 1.7)
    handed = method.student(x, sigma, {LOW_RESOLUTION: shrink(x0, 4)})
    torch.testing.assert_close(method.target(x, sigma, x0), handed)
    assert (handed - teacher(x, sigma, {LOW_RESOLUTION: shrink(x0, 4)})).abs().max() > 1e-3
    assert teacher.cond.factor == 2


def test_the_student_serves_in_one_step_from_the_highest_level_that_was_trained(teacher):
    method = made(teacher)
    spec = method.student.sampler
    assert (spec.kind, spec.num_steps, spec.max_steps, spec.guidable) == ("few_step", 1, 1, False)
    assert spec.sigmas == method.grid.levels[:1]


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ((8, 4), "must rise"),
        ((4, 6), "each a multiple"),
        ((2, 4), "begins with 2, and the teacher enlarges 2 times"),
        ((3,), "begins with 3"),
        ((4, 32), "16 x 16 pixels do not divide by 32"),
    ],
)
def test_factors_that_cannot_be_are_refused_by_their_name(teacher, factors, said):
    with pytest.raises(ConfigError, match=said) as refused:
        Yonos(Config.parse({"factors": list(factors)}, where="config"), teacher=teacher, student=teacher)
    assert refused.value.field == "config.factors"


def test_a_teacher_that_does_not_enlarge_is_refused():
    network = NetworkConfig(name="UNet2DModel", args=TINY_NETWORKS["UNet2DModel"])
    plain = build_denoiser(network, parameterisation="v", shape=(1, 16, 16), num_classes=None)
    with pytest.raises(ConfigError, match="does not enlarge pictures") as refused:
        made(plain)
    assert refused.value.field == "teacher"

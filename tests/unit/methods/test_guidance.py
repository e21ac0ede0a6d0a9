"""Guidance distillation: what is taught, what stays the teacher's, and who can be taught at all."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.errors import ConfigError
from distill_core.method import Batch
from distill_core.methods.diffusion.guided import Config as GuidedConfig
from distill_core.methods.diffusion.guided import Guided
from distill_core.methods.diffusion.lora_guidance import Config, LoraGuidance
from distill_core.methods.diffusion.progressive import Config as ProgressiveConfig
from distill_core.methods.diffusion.progressive import Progressive
from distill_core.networks.adapters import LoraDenoiser, weights_sha256
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import EvaluateConfig, LoraConfig, NetworkConfig
from tests.helpers import TINY_NETWORKS

COND = {"class_label": torch.arange(8) % 3}


def teacher_of(num_classes=3):
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=TINY_NETWORKS["DiTTransformer2DModel"])
    teacher = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=num_classes)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    teacher.sampler = teacher.sampler.model_copy(update={"num_steps": 3})
    return teacher.requires_grad_(False)


def made(**config):
    teacher = teacher_of()
    student = LoraDenoiser(teacher, LoraConfig(rank=6, alpha=9.0, targets="all-linear"))
    return LoraGuidance(Config(**config), teacher=teacher, student=student)


def trained(method, steps):
    optimizer = torch.optim.Adam(method.student.parameters(), 1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = Batch.of(8, torch.randn(8, 1, 8, 8), COND)
        for update in method.updates(batch, step):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            losses.append(float(update.loss))
    return losses


def test_factors_learn_to_guide_in_one_pass_over_weights_that_stay():
    method = made(guidance=4.0)
    before = weights_sha256(method.teacher)
    x, sigma = torch.randn(8, 1, 8, 8) * 3, torch.linspace(0.2, 6, 8)
    guided = method.teacher.guided(x, sigma, COND, 4.0)
    start = method.figures(EvaluateConfig(num_samples=6))
    assert start["guided_error"] == pytest.approx(start["unguided_error"])
    first = float((method.student(x, sigma, COND) - guided).square().mean())
    trained(method, 150)
    assert float((method.student(x, sigma, COND) - guided).square().mean()) < 0.4 * first
    assert weights_sha256(method.teacher) == before
    with method.student.off():
        assert torch.equal(method.student(x, sigma, COND), method.teacher(x, sigma, COND))
    assert not method.student.sampler.guidable
    assert method.figures(EvaluateConfig(num_samples=6))["guided_error"] < 0.5 * start["unguided_error"]


def test_the_conditional_target_is_the_teacher_without_guidance():
    assert trained(made(guidance=4.0, target="conditional"), 1) == [0.0]
    assert trained(made(guidance=4.0), 1)[0] > 0


def test_a_full_student_and_a_teacher_without_conditions_are_refused():
    teacher = teacher_of()
    with pytest.raises(ConfigError, match="low-rank factors") as error:
        LoraGuidance(Config(), teacher=teacher, student=teacher)
    assert error.value.field == "student.lora"
    alone = teacher_of(num_classes=None)
    student = LoraDenoiser(alone, LoraConfig(rank=2, alpha=2.0, targets="all-linear"))
    with pytest.raises(ConfigError, match="null condition"):
        LoraGuidance(Config(), teacher=alone, student=student)


def guided(**config):
    teacher = teacher_of()
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Guided(GuidedConfig(**config), teacher=teacher, student=student)


def test_one_network_learns_a_range_of_guidance_and_tells_its_scales_apart():
    method = guided(guidance_min=1.0, guidance_max=6.0)
    x, sigma = torch.randn(8, 1, 8, 8) * 3, torch.linspace(0.4, 6, 8)

    def error(scale):
        wanted = method.teacher.guided(x, sigma, COND, scale)
        return float((method.student.guided(x, sigma, COND, scale) - wanted).square().mean())

    with torch.no_grad():
        before = {scale: error(scale) for scale in (1.0, 3.5, 6.0)}
        assert before[1.0] == 0
    trained(method, 200)
    with torch.no_grad():
        for scale in (3.5, 6.0):
            assert error(scale) < 0.5 * before[scale]
        other = method.student.guided(x, sigma, COND, 2.0) - method.teacher.guided(x, sigma, COND, 6.0)
        assert float(other.square().mean()) > 2 * error(6.0)
    assert method.student.sampler.guidance_range == (1.0, 6.0)
    assert set(method.figures(EvaluateConfig(num_samples=4))) == {
        f"{kind}_error{suffix}" for kind in ("guided", "unguided") for suffix in ("_low", "_middle", "_high")
    }


def test_a_student_that_is_not_told_has_one_answer_for_all_scales():
    method = guided(told=False)
    trained(method, 3)
    x, sigma = torch.randn(4, 1, 8, 8), torch.ones(4)
    cond = {"class_label": torch.arange(4) % 3}
    with torch.no_grad():
        assert torch.equal(
            method.student.guided(x, sigma, cond, 1.0), method.student.guided(x, sigma, cond, 4.0)
        )


def test_a_range_needs_two_ends_and_a_student_that_can_gain_an_input():
    with pytest.raises(ConfigError, match="below guidance_max"):
        GuidedConfig.parse({"guidance_min": 2.0, "guidance_max": 2.0}, where="config")
    teacher = teacher_of()
    student = LoraDenoiser(teacher, LoraConfig(rank=2, alpha=2.0, targets="all-linear"))
    with pytest.raises(ConfigError, match="gains an input") as error:
        Guided(GuidedConfig(), teacher=teacher, student=student)
    assert error.value.field == "student.lora"


def test_progressive_halves_a_told_teacher_for_all_of_its_range():
    teacher = guided(guidance_min=1.0, guidance_max=6.0).student.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    method = Progressive(ProgressiveConfig(start_steps=4, end_steps=2), teacher=teacher, student=student)
    torch.manual_seed(0)
    batch = Batch.of(8, torch.randn(8, 1, 8, 8), COND)
    scales = method.told(batch)["guidance"]
    assert scales.min() >= 1
    assert scales.max() <= 6
    assert len(scales.unique()) == 8
    (update,) = method.updates(batch, 0)
    assert torch.isfinite(update.loss)
    assert method.student.sampler.guidance_range == (1.0, 6.0)
    assert len(method.student.sampler.sigmas) == 4
    with pytest.raises(ConfigError, match="leave config.guidance out"):
        Progressive(ProgressiveConfig(guidance=2.0), teacher=teacher, student=student)

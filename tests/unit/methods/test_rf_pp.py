"""RF++ against a Gaussian teacher: its parts by hand, and its off switches against plain reflow, bit for bit."""

from __future__ import annotations

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.pairs import build_pairs
from distill_core.diffusion.rectified import level_of, velocity
from distill_core.method import Batch
from distill_core.methods.diffusion.instaflow import InstaFlow
from distill_core.methods.diffusion.rf_pp import RFPP
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig, PairsConfig
from tests.oracles import AffineDenoiser, StraightFlow
from tests.unit.methods.test_instaflow import END, MEAN, STD, ends, pairs_of, run

PLAIN = {"times": "uniform", "distance": "l2", "features": "off"}


def method_of(folder, student=None, **config: object) -> RFPP:
    values = {"features": "off", "held_out": 64, **config}
    teacher = AffineDenoiser(MEAN, STD).requires_grad_(False)
    student = student or StraightFlow(-0.4, 0.7)
    return RFPP(RFPP.Config.parse(values), teacher=teacher, student=student, pairs=pairs_of(folder))


def test_with_everything_off_a_step_is_plain_reflow_to_the_bit(tmp_path):
    plain = InstaFlow(
        InstaFlow.Config(held_out=64),
        teacher=AffineDenoiser(MEAN, STD),
        student=StraightFlow(-0.4, 0.7),
        pairs=pairs_of(tmp_path),
    )
    losses = []
    for method in (plain, method_of(tmp_path, **PLAIN)):
        torch.manual_seed(5)
        losses.append(next(method.updates(Batch.of(9), 0)).loss)
    assert torch.equal(*losses)
    torch.manual_seed(5)
    assert not torch.equal(losses[0], next(method_of(tmp_path).updates(Batch.of(9), 0)).loss)


@pytest.mark.parametrize("distance", ["l2", "huber_norm"])
def test_u_shaped_times_lead_to_the_same_straight_flow(tmp_path, distance):
    method = method_of(tmp_path, distance=distance)
    run(method, 0, 200)
    assert ends(method.student) == pytest.approx(END, abs=0.02)


def test_the_velocity_s_distance_is_that_of_the_line_s_own_velocity(tmp_path):
    method = method_of(tmp_path, AffineDenoiser(MEAN, STD))  # begins as its teacher
    line, t = method.line(method.pairs.at(torch.arange(6))), torch.linspace(0.05, 0.9, 6)
    found, x0 = method.velocity_distance(line, t)
    x, sigma = line.at(level_of(t)), level_of(t)
    assert torch.equal(x0, method.teacher(x, sigma))
    error = velocity(x, x0, sigma) - (line.eps - line.x0)
    torch.testing.assert_close(found, error.square().flatten(1).mean(1), rtol=1e-3, atol=1e-6)


def with_features(folder, **config: object) -> RFPP:
    torch.manual_seed(0)
    args = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}
    network = NetworkConfig(name="DiTTransformer2DModel", args=args)
    teacher, student = (
        build_denoiser(network, parameterisation="flow", shape=(1, 8, 8), num_classes=10) for _ in range(2)
    )
    for parameter in (*teacher.parameters(), *student.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    reader = Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=10, width=8))
    source = build_source({"name": "classes", "num_classes": 10})
    pairs = build_pairs(teacher, source, PairsConfig(count=32, num_steps=2), folder / "pairs")
    values = {"held_out": 8, **config}
    return RFPP(RFPP.Config.parse(values), teacher=teacher, student=student, pairs=pairs, extractor=reader)


@pytest.mark.parametrize(("features", "power"), [("inverse", -1), ("even", 0)])
def test_the_loss_is_huber_less_towards_noise_and_features_more_towards_the_picture(
    tmp_path, features, power
):
    method = with_features(tmp_path, features=features, feature_weight=0.3)
    torch.manual_seed(4)
    (update,) = method.updates(Batch.of(5), 0)
    torch.manual_seed(4)
    line, t = method.drawn(5), method.times(5, "u_shaped", 4.0)
    x, sigma = line.at(level_of(t)), level_of(t)
    x0 = method.student(x, sigma, line.cond)
    error = (velocity(x, x0, sigma) - (line.eps - line.x0)).flatten(1)
    c = 0.00054 * 64
    huber = ((error.square().sum(1) + c**2).sqrt() - c) / 64
    seen = method.features.items(x0, line.x0)
    expected = ((1 - t) * huber).mean() + (0.3 * t**power * seen).mean()
    torch.testing.assert_close(update.loss, expected, rtol=1e-3, atol=1e-5)
    assert float(update.metrics["features"]) > 0.01
    update.loss.backward()
    assert all(value.grad is None for value in method.features.parameters())


def test_a_student_is_served_in_one_two_and_four_of_euler_s_steps(tmp_path):
    spec = method_of(tmp_path).student.sampler
    assert (spec.step_counts, spec.eta, spec.guidable) == ((1, 2, 4), 0.0, False)
    assert method_of(tmp_path, num_steps=2).student.sampler.step_counts == (1, 2)
    figures = method_of(tmp_path, StraightFlow(*END)).figures(EvaluateConfig(batch_size=24))
    assert figures["straightness"] < 1e-6 < figures["teacher_straightness"]
    assert max(figures[f"velocity_error_{at}"] for at in ("picture", "middle", "noise")) < 1e-3

"""Hyper-SD's score and feedback sides: what they add to DMD2, which levels are trained, and where the hinge stops."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.data import build_source
from distill_core.data.pairs import build_pairs
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ConfigError
from distill_core.losses.reward import Ink, hinge_loss
from distill_core.method import Batch
from distill_core.methods.diffusion.dmd2 import DMD2
from distill_core.methods.diffusion.hyper_sd_feedback import HyperSDFeedback
from distill_core.methods.diffusion.hyper_sd_score import HyperSDScore
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import EvaluateConfig, LoraConfig, NetworkConfig, PairsConfig

DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}
LORA = LoraConfig(rank=2, alpha=2.0, targets="all-linear")
LEVELS = (5.0, 1.6, 0.6, 0.2)
UNIFIED = {"levels": LEVELS, "step_counts": (1, 2, 4)}
CLASSES = build_source({"name": "classes", "num_classes": 10})


def network():
    torch.manual_seed(0)
    denoiser = build_denoiser(
        NetworkConfig(name="DiTTransformer2DModel", args=DIT),
        parameterisation="edm",
        shape=(1, 8, 8),
        num_classes=10,
    )
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.requires_grad_(False)


def score(cls=HyperSDScore, folder=None, **config: object):
    teacher = network()
    student = LoraDenoiser(teacher, LORA)
    pairs = build_pairs(teacher, CLASSES, PairsConfig(count=16, num_steps=2), folder) if folder else None
    return cls(cls.Config.parse({"critic_steps": 2, **config}), teacher=teacher, student=student, pairs=pairs)


def feedback(levels=LEVELS, extractor=None, counts=(1, 2, 4), **config: object) -> HyperSDFeedback:
    base = network()
    base.sampler = SamplerSpec.few_step(levels, noise_scale=levels[0], step_counts=counts)
    values = {"threshold": 1.0, **config}
    student = LoraDenoiser(base, LORA)
    return HyperSDFeedback(HyperSDFeedback.Config.parse(values), student=student, extractor=extractor)


def batch(size: int = 8, x0: torch.Tensor | None = None) -> Batch:
    return Batch.of(size, x0, {"class_label": torch.arange(size) % 10})


def trace(method, steps: int = 3, lr: float = 0.1) -> list[torch.Tensor]:
    """Losses of a short training, with every weight of every role at its end."""
    torch.manual_seed(1)
    optimizers = {r: torch.optim.SGD(getattr(method, r).parameters(), lr) for r in method.roles}
    seen = []
    for step in range(steps):
        for update in method.updates(batch(), step):
            update.loss.backward(inputs=list(getattr(method, update.role).parameters()))
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
            seen.append(update.loss.detach())
    return [*seen, *(p.detach() for role in method.roles for p in getattr(method, role).parameters())]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


def watched(method) -> list[tuple[float, bool]]:
    """The level of each student call from now on, and whether it kept a gradient."""
    seen: list[tuple[float, bool]] = []
    method.student.register_forward_hook(
        lambda _module, given, output: seen.append((round(float(given[1][0]), 4), output.requires_grad))
    )
    return seen


def test_one_number_of_steps_and_no_weights_are_bit_identical_to_dmd2():
    assert same(trace(score(levels=(5.0,))), trace(score(DMD2, levels=(5.0,))))
    assert not same(trace(score(**UNIFIED)), trace(score(DMD2, levels=LEVELS)))


@pytest.mark.slow
def test_unused_terms_leave_the_loss_bit_identical(tmp_path):
    plain = trace(score(**UNIFIED))
    assert same(trace(score(folder=tmp_path, threshold=0.4, **UNIFIED)), plain)
    assert not same(trace(score(folder=tmp_path, mse_weight=0.1, **UNIFIED)), plain)
    assert not same(trace(score(feedback_weight=0.1, **UNIFIED)), plain)


@pytest.mark.parametrize("make", [score, feedback])
def test_every_level_of_every_path_is_trained_by_one_call_on_what_sampling_arrives_with(make):
    method = score(**UNIFIED) if make is score else feedback()
    paths = {
        (5.0,),
        (5.0, 0.6),
        (5.0, 1.6),
        (5.0, 1.6, 0.6),
        (5.0, 1.6, 0.6, 0.2),
    }  # each ends where the gradient is
    calls, found = watched(method), set()
    for _ in range(60):
        calls.clear()
        method.generate(batch(2))
        assert [kept for _, kept in calls] == [False] * (len(calls) - 1) + [True]
        found.add(tuple(level for level, _ in calls))
    assert found == paths
    assert method.student.sampler.step_counts == (1, 2, 4)


def test_training_the_first_level_alone_still_serves_all_numbers_of_steps():
    method = score(trained="first", **UNIFIED)
    calls = watched(method)
    for _ in range(20):
        method.generate(batch(2))
    assert {level for level, _ in calls} == {5.0}
    assert method.student.sampler.levels(2) == [5.0, 0.6]


def test_the_stability_term_is_the_distance_to_the_teachers_samples(tmp_path):
    losses = []
    for weight in (0.0, 0.7):
        method = score(folder=tmp_path, mse_weight=weight, **UNIFIED)
        torch.manual_seed(2)
        x0 = method.generate(batch())
        losses.append(method.student_loss(x0, batch(), 0)[0])
        if weight:
            torch.manual_seed(2)
            method.generate(batch())
            super(HyperSDScore, method).student_loss(x0, batch(), 0)
            expected = 0.7 * method.regression_loss(8)
    torch.testing.assert_close(losses[1] - losses[0], expected)


def test_the_feedback_term_is_a_hinge_whose_gradient_reaches_the_samples():
    losses, gradients = [], []
    for weight in (0.0, 2.0):
        method = score(feedback_weight=weight, threshold=0.6, **UNIFIED)
        x0 = torch.linspace(-1, 1, 8 * 64).reshape(8, 1, 8, 8).requires_grad_(True)
        torch.manual_seed(3)
        losses.append(method.student_loss(x0, batch(), 0)[0])
        gradients.append(torch.autograd.grad(losses[-1], x0)[0])
    ink = Ink().score(x0, {})
    torch.testing.assert_close(losses[1] - losses[0], 2 * hinge_loss(ink, 0.6))
    pull = gradients[1] - gradients[0]
    assert (pull[ink < 0.6] < 0).all()
    assert pull[ink > 0.6].abs().max() < 1e-7


def test_feedback_raises_the_reward_in_step_with_its_weight_and_leaves_the_base_alone():
    method = feedback(counts=(1, 2))
    weights = {n: p.clone() for n, p in method.student.adapted.named_parameters() if "lora_" not in n}
    trace(method, 15, lr=10.0)
    method.student.strength = 0.8
    found = method.figures(EvaluateConfig(num_samples=64, batch_size=64))
    assert method.student.strength == pytest.approx(0.8)
    assert found["off_reward"] + 0.02 < found["half_reward"] < found["full_reward"] - 0.02
    after = dict(method.student.adapted.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


def test_above_its_threshold_the_reward_has_no_gradient():
    method = feedback(threshold=0.0)
    (update,) = method.updates(batch(), 0)
    assert update.loss == 0
    assert same(trace(method), [torch.zeros(())] * 3 + [p.detach() for p in feedback().student.parameters()])


@pytest.mark.slow
def test_the_perception_term_teaches_to_recover_what_the_classifier_knows():
    torch.manual_seed(0)
    reader = Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=10, width=8)).requires_grad_(False)
    method = feedback((0.6, 0.2), reader, counts=(), threshold=0.0, perception_weight=1.0)
    x0 = torch.randn(40, 1, 8, 8)
    pictures = Batch.of(40, x0, {"class_label": reader(x0).argmax(1)})
    parameters = list(method.student.parameters())
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for step in range(40):
        torch.manual_seed(step % 2)  # both levels, always the same noise
        (update,) = method.updates(pictures, step)
        update.loss.backward(inputs=parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(update.loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert "x0" in method.columns(method.config)
    assert method.columns(feedback().config) == {}


def test_the_perception_term_is_the_weighed_error_on_a_picture_noised_to_the_level_that_is_told():
    torch.manual_seed(0)
    reader = Classifier(ClassifierConfig(shape=(1, 8, 8), num_classes=10, width=8)).requires_grad_(False)
    method = feedback((0.6,), reader, counts=(), threshold=0.0, perception_weight=0.4)
    pictures, seen = batch(6, torch.randn(6, 1, 8, 8)), []
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    (update,) = method.updates(pictures, 0)
    x_sigma, sigma = seen[-1]
    assert (sigma == 0.6).all()
    assert (x_sigma - pictures.x0).std().item() == pytest.approx(0.6, rel=0.15)
    recovered = method.student(x_sigma, sigma, pictures.cond)
    error = torch.nn.functional.cross_entropy(reader(recovered), pictures.cond["class_label"])
    torch.testing.assert_close(update.loss, 0.4 * error)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: score(levels=LEVELS), "number of levels, 4"),
        (lambda: score(levels=LEVELS, step_counts=(4, 1)), "strictly ascending"),
        (lambda: score(mse_weight=1.0), r"add a \[pairs\] table"),
        (lambda: feedback(perception_weight=1.0), r"10 classes: set \[extractor\]"),
        (
            lambda: HyperSDFeedback(HyperSDFeedback.Config(threshold=1.0), student=copy.deepcopy(network())),
            "set student.lora",
        ),
    ],
)
def test_what_cannot_work_is_said_before_training(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()

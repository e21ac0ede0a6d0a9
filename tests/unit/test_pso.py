"""PSO: its losses against closed forms, its reference, its pairs, and what a short training does."""

from __future__ import annotations

import math

import pytest
import torch

from distill_core.data import build_source
from distill_core.diffusion.sampling import SamplerSpec
from distill_core.errors import ConfigError
from distill_core.losses.pairwise import noise_error
from distill_core.method import Batch
from distill_core.methods.diffusion.pso import PSO, concept_loss, offline_loss
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import EvaluateConfig, LoraConfig, NetworkConfig

DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}
LORA = LoraConfig(rank=2, alpha=2.0, targets="all-linear")


def base(levels: tuple[float, ...] = (5.0,)):
    """A class-conditional few-step student with weights that matter everywhere."""
    torch.manual_seed(0)
    network = NetworkConfig(name="DiTTransformer2DModel", args=DIT)
    denoiser = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser.sampler = SamplerSpec.few_step(levels, noise_scale=levels[0])
    return denoiser.requires_grad_(False)


def build(levels: tuple[float, ...] = (5.0,), **config: object) -> PSO:
    student = LoraDenoiser(base(levels), LORA)
    source = build_source({"name": "digits"})
    return PSO(PSO.Config.parse(config), student=student, data=source)


def batch(size: int = 16) -> Batch:
    return Batch.of(size, None, {"class_label": torch.arange(size) % 10})


def train(method: PSO, steps: int, lr: float = 0.01) -> None:
    parameters = list(method.student.parameters())
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        torch.manual_seed(step)
        for update in method.updates(batch(64), step):
            update.loss.backward(inputs=parameters)
            optimizer.step()
            optimizer.zero_grad()


def gradients(method: PSO) -> list[torch.Tensor]:
    parameters = list(method.student.parameters())
    found = []
    for update in method.updates(batch(), 0):
        given = torch.autograd.grad(update.loss, parameters, allow_unused=True)
        found += [torch.zeros(1) if gradient is None else gradient for gradient in given]
    return found


def test_an_untrained_student_is_its_reference_so_the_loss_is_the_log_of_two():
    method = build()
    (update,) = method.updates(batch(), 0)
    assert update.role == "student"
    assert update.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert any(gradient.any() for gradient in gradients(method))


def test_the_gradient_is_a_shift_towards_the_preferred_whatever_the_student_says():
    """With one output for both inputs the pull of x_w and the push of x_l leave x_l - x_w alone."""
    wanted, own = torch.full((4, 1, 2, 2), 0.7), torch.full((4, 1, 2, 2), 0.2)
    sigma = torch.full((4,), 2.0)
    slopes = []
    for said in (-0.5, 0.9):
        output = torch.tensor(said, requires_grad=True)
        predicted = output.expand(4, 1, 2, 2)
        error = noise_error(predicted, wanted, sigma), noise_error(predicted, own, sigma)
        reference = error[0].detach(), error[1].detach()
        offline_loss(error, reference, beta=6.0, eta=1.0).backward()
        slopes.append(output.grad.item())
    # beta / 2 d(e_w - e_l)/dD = beta (x_l - x_w) / sigma^2
    assert slopes == pytest.approx([6.0 * (0.2 - 0.7) / 4] * 2, rel=1e-4)


def test_eta_weighs_the_students_own_sample():
    error = torch.tensor([1.0]), torch.tensor([2.0])
    reference = torch.tensor([1.5]), torch.tensor([2.7])
    loss = offline_loss(error, reference, beta=2.0, eta=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0 * (0.5 - 0.1 * 0.7))))


def test_the_concept_loss_is_a_hinge_and_a_prior_and_without_both_it_is_plain_fine_tuning():
    wanted, own = torch.tensor([0.2, 3.0]), torch.tensor([0.5, 9.0])
    loss = concept_loss((wanted, own), beta=5.0, eta=1.0, prior_weight=0.5)
    assert loss.item() == pytest.approx(((1 - 5 * 0.3) * 0 + 0) / 2 + 0.5 * 4.75)
    plain = concept_loss((wanted, own), beta=1.0, eta=0.0, prior_weight=0.0)
    assert plain.item() == pytest.approx(1 + 1.6)


def test_the_preferred_are_the_share_of_the_data_that_the_reward_likes_best():
    method = build()
    ink = (method.data.all().x0.flatten(1).mean(1) + 1) / 2
    assert len(method.preferred) == round(0.3 * len(ink))
    chosen = torch.zeros(len(ink), dtype=torch.bool)
    chosen[method.preferred] = True
    assert ink[chosen].min() >= ink[~chosen].max()


def test_a_share_of_one_takes_all_items_and_asks_no_reward():
    method = build(preferred_share=1.0)
    assert method.preferred.tolist() == list(range(1797))
    assert len(build(preferred_share=1.0, ranked=10).preferred.unique()) == 10


def test_both_samples_of_a_pair_have_one_level_one_noise_and_one_condition():
    method = build((5.0, 1.0))
    x0, x_sigma, sigma, cond = method.draw_pair(32)
    eps = (x_sigma - x0) / sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(eps[:32], eps[32:], atol=1e-4, rtol=1e-4)
    assert torch.equal(sigma[:32], sigma[32:])
    assert set(sigma.tolist()) == {5.0, 1.0}
    assert torch.equal(cond["class_label"][:32], cond["class_label"][32:])
    assert not torch.equal(x0[:32], x0[32:])


def test_own_samples_come_from_the_reference_however_far_the_student_went():
    method = build()
    torch.manual_seed(3)
    before = method.draw_pair(8)[0]
    for parameter in method.student.parameters():
        torch.nn.init.normal_(parameter)
    torch.manual_seed(3)
    assert torch.equal(before, method.draw_pair(8)[0])
    torch.manual_seed(4)
    assert not torch.equal(before[8:], method.draw_pair(8)[0][8:])  # fresh ones in every update


def test_the_reference_is_the_student_with_its_factors_off():
    method = build(eta=0.5)
    for parameter in method.student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.manual_seed(8)
    (update,) = method.updates(batch(), 0)
    torch.manual_seed(8)
    pair = method.draw_pair(16)
    with torch.no_grad():
        error = method.errors(*pair)
        with method.student.off():
            reference = method.errors(*pair)
    assert not torch.equal(error[0], reference[0])
    torch.testing.assert_close(update.loss, offline_loss(error, reference, beta=50.0, eta=0.5))


def test_the_preferred_are_encoded_as_the_student_needs_them():
    method = build()
    torch.manual_seed(9)
    plain = method.draw_pair(8)[0]
    method.student.adapted.encode = lambda picture: 0.5 * picture  # a latent model's
    torch.manual_seed(9)
    encoded = method.draw_pair(8)[0]
    assert torch.equal(encoded[:8], 0.5 * plain[:8])
    assert torch.equal(encoded[8:], plain[8:])


@pytest.mark.parametrize("mode", ["offline", "concept"])
def test_training_moves_the_samples_towards_more_ink_and_leaves_the_reference_alone(mode):
    config = EvaluateConfig(num_samples=64, batch_size=64)
    method = build(mode=mode, beta=50.0 if mode == "offline" else 5.0)
    weights = {name: value.clone() for name, value in method.student.adapted.named_parameters()}
    start = method.figures(config)
    assert start["reward"] == start["start_reward"]
    assert start["preferred_reward"] > 0.33
    train(method, 20)
    end = method.figures(config)
    direction = math.copysign(1, start["preferred_reward"] - start["reward"])
    assert direction * (end["reward"] - start["reward"]) > 0.01
    assert end["start_reward"] == start["reward"]
    after = dict(method.student.adapted.named_parameters())
    assert all(torch.equal(weights[name], after[name]) for name in weights if "lora_" not in name)


def test_online_compares_every_drawn_transition_and_not_the_last_step():
    method = build((5.0, 2.0, 0.5), mode="online")
    method.reward = Preferring("more")
    updates = list(method.updates(batch(), 0))
    assert len(updates) == 2
    assert all(update.loss.item() == pytest.approx(math.log(2), abs=1e-6) for update in updates)
    assert any(gradient.any() for gradient in gradients(method))


class Preferring:
    """Scores that favour more or less ink, or nothing."""

    def __init__(self, wish: str) -> None:
        self.sign = {"more": 1, "less": -1, "nothing": 0}[wish]

    def score(self, picture, cond):
        return self.sign * picture.flatten(1).mean(1)


def test_a_tie_has_no_gradient_and_opposite_tastes_have_opposite_ones():
    found = {}
    for wish in ("more", "less", "nothing"):
        method = build((5.0, 1.0), mode="online")
        method.reward = Preferring(wish)
        torch.manual_seed(5)
        found[wish] = gradients(method)
    assert not any(gradient.any() for gradient in found["nothing"])
    assert any(gradient.any() for gradient in found["more"])
    for one, other in zip(found["more"], found["less"]):
        torch.testing.assert_close(one, -other)


def test_an_online_step_makes_the_preferred_trajectory_likelier_than_the_other():
    method = build((5.0, 1.0), mode="online", beta=50.0)
    method.reward = Preferring("more")
    torch.manual_seed(6)
    cond = {"class_label": (torch.arange(16) % 10).repeat(2)}
    with torch.no_grad():
        x0, states = method.trajectory(32, cond)
    first, second = method.reward.score(x0, cond).chunk(2)
    parameters = list(method.student.parameters())
    torch.manual_seed(6)
    (update,) = method.updates(batch(16), 0)
    update.loss.backward(inputs=parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 1e-3 * parameter.grad / max(parameter.grad.norm(), 1e-12)
        one, two = method.log_ratio(states[0], states[1], 0, cond).chunk(2)
    assert (torch.sign(first - second) * (one - two)).mean() > 0


def test_the_last_states_of_a_trajectory_are_what_sampling_itself_passes_through():
    method = build((5.0, 1.0))
    torch.manual_seed(7)
    with torch.no_grad():
        x0, states = method.trajectory(4, batch(4).cond)
    torch.manual_seed(7)
    z, again = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        first = method.student(5.0 * z, torch.full((4,), 5.0), batch(4).cond)
        last = method.student(first + again, torch.full((4,), 1.0), batch(4).cond)
    assert torch.equal(states[0], 5.0 * z)
    torch.testing.assert_close(states[1], first + again)
    torch.testing.assert_close(x0, last)


def test_online_needs_no_pictures_and_offline_does():
    assert PSO.columns(PSO.Config(mode="online")) == {}
    assert "x0" in PSO.columns(PSO.Config())


def test_what_cannot_work_is_said_before_training():
    source, config = build_source({"name": "digits"}), PSO.Config()
    with pytest.raises(ConfigError, match="set student.lora"):
        PSO(config, student=base(), data=source)
    slow = base()
    slow.sampler = SamplerSpec(kind="heun", noise_scale=80.0, num_steps=8, max_steps=100)
    with pytest.raises(ConfigError, match="distilled to few steps"):
        PSO(config, student=LoraDenoiser(slow, LORA), data=source)
    with pytest.raises(ConfigError, match="no density to compare"):
        build(mode="online")

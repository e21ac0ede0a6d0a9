"""The passes of a step as the bench sees them: which networks, differentiated from where and in what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.network_passes import passes_of_a_step
from benchmarks.trainer import benched_recipes
from distill_core.config import Config
from distill_core.data import build_source
from distill_core.method import Method, Update
from distill_core.recipe import load_recipe
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.helpers import tiny_trainer


class Pair(Method):
    """A student read by a critic: by its last layer for its own update, by its first for the student's."""

    Config = Config
    roles = ("critic", "student")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))

    def preview(self, seed):
        return None

    def updates(self, batch, step):
        x = batch.x0.flatten(1)
        with torch.no_grad():
            made = self.student(x)
        yield Update("critic", self.critic(made).mean())
        self.critic(x)  # looked at, and not used
        seen = []
        handle = self.critic[0].register_forward_hook(lambda _layer, _args, output: seen.append(output))
        self.critic(self.student(x))
        handle.remove()
        yield Update("student", seen[0].square().mean())


@pytest.fixture
def trainer(tmp_path):
    values = {"method": "pair", "steps": 3, "batch_size": 4, "data": {"name": "digits"}}
    recipe = load_recipe(values)
    return Trainer(Pair(), build_source(recipe.data), recipe, Run(tmp_path))


def test_passes_are_told_apart_by_network_gradient_and_where_it_enters(trainer):
    student, critic = trainer.method.student, trainer.method.critic
    passes = passes_of_a_step(trainer)
    assert [found.network for found in passes] == [student, critic, critic, student, critic]
    assert [found.differentiated for found in passes] == [False, True, False, True, True]
    entered = [found.inner[found.reached][0] for found in passes if found.differentiated]
    assert entered[0] in (critic, critic[2])  # both give the loss's input
    assert entered[1] in (student, student[1])
    assert entered[2] is critic[0]  # the last two layers got no gradient
    assert [len(found.wanted) for found in passes] == [0, 0, 0, 0, 1]  # through the critic to the student


def test_a_repeated_pass_computes_those_gradients_and_leaves_no_trace(trainer, monkeypatch):
    passes = passes_of_a_step(trainer)
    before = {name: value.clone() for name, value in trainer.method.named_parameters()}
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd,
        "grad",
        lambda output, inputs, *rest, **options: (
            asked.append([tuple(value.shape) for value in inputs]),
            grad(output, inputs, *rest, **options),
        ),
    )
    for found in passes:
        found.repeat()
    critic = [(8, 64), (8,), (1, 8), (1,)]
    assert asked == [
        critic,
        [(64, 64), (64,)],
        [(4, 64)],
    ]  # of the frozen critic only what leads to the student
    for name, value in trainer.method.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_a_methods_own_hooks_and_the_trainer_are_as_before(trainer):
    passes_of_a_step(trainer)
    assert "backward" not in vars(trainer.accelerator)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.slow
def test_dmd2_is_seen_as_the_passes_it_is_made_of(context, tmp_path):
    trainer = tiny_trainer("dmd2", context, tmp_path)
    networks = [
        trainer.method.teacher.network,
        trainer.method.student.network,
        trainer.method.fake_score.denoiser.network,
    ]
    teacher, student, fake = (
        [found.differentiated for found in passes_of_a_step(trainer) if found.network is network]
        for network in networks
    )
    critic_steps = trainer.method.config.critic_steps
    assert teacher == [False]
    assert student == [False] * critic_steps + [True]
    assert fake == [True] * (critic_steps + 1)  # the last one leads to the student alone


def test_the_networks_of_a_low_rank_fake_score_are_seen_too(context, tmp_path):
    trainer = tiny_trainer("swiftbrush", context, tmp_path)
    passes = passes_of_a_step(trainer)
    adapted = trainer.method.fake_score.denoiser.adapted.network
    expected = trainer.method.config.fake_steps
    assert sum(found.network is adapted and found.differentiated for found in passes) == expected


def test_recomputed_activations_are_part_of_their_pass(context, tmp_path):
    plain = tiny_trainer("swiftbrush", context, tmp_path / "a")
    lean = tiny_trainer("swiftbrush", context, tmp_path / "b", **{"student.gradient_checkpointing": True})
    assert len(passes_of_a_step(plain)) == len(passes_of_a_step(lean))


def test_recipes_are_found_not_listed():
    from distill_core.methods import family, find_method, method_names

    found = benched_recipes()
    methods = {load_recipe(name).method for name in found}
    assert {"dmd2", "swiftbrush", "pg_sb"} <= methods <= set(method_names())
    assert {family(find_method(name)) for name in methods} == {"diffusion"}
    assert len(methods) == len(found)

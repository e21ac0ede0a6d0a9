"""Stages of a run: where they lie, who is trained in them, with which optimisers, and that a resumed run is exact."""

from __future__ import annotations

import pytest
import torch

from distill_core.config import Config
from distill_core.data import build_source
from distill_core.errors import ArtifactError, ConfigError
from distill_core.method import Method, Stage, Update
from distill_core.recipe import load_recipe
from distill_core.training.checkpoint import load_latest, save_checkpoint
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from distill_core.training.seeding import derive
from distill_core.training.stages import (
    check_sharded,
    check_tables,
    place_stages,
    select_parameters,
    stage_at,
)
from distill_core.training.strategy import Replicated

FIRST, SECOND, THIRD = (Stage(name, steps, ("model",)) for name, steps in (("a", 3), ("b", 4), ("c", 1)))


def test_stages_lie_one_after_the_other_and_the_last_takes_what_is_left():
    placed = place_stages((FIRST, SECOND, THIRD), 12)
    assert [(one.index, one.start, one.stop) for one in placed] == [(0, 0, 3), (1, 3, 7), (2, 7, 12)]
    at = [stage_at(placed, step).stage.name for step in range(14)]
    assert "".join(at) == "aaabbbbccccccc"


def test_a_run_that_ends_early_has_no_later_stage():
    placed = place_stages((FIRST, SECOND, THIRD), 5)
    assert [(one.stage.name, one.start, one.stop) for one in placed] == [("a", 0, 3), ("b", 3, 5)]
    assert [one.stage.name for one in place_stages((FIRST, SECOND, THIRD), 3)] == ["a"]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ((), "these are none"),
        ((FIRST, FIRST), "different names, and these are a, a"),
        ((FIRST, Stage("b", 0, ("model",))), "stage b has 0 steps"),
    ],
)
def test_stages_that_cannot_be_laid_out_are_refused(stages, sentence):
    with pytest.raises(ConfigError, match=sentence):
        place_stages(stages, 9)


def test_a_table_of_a_stage_that_is_not_there_is_refused_with_the_nearest_name():
    placed = place_stages((Stage("codec", 2, ("model",)), Stage("denoiser", 2, ("model",))), 5)
    with pytest.raises(ConfigError, match=r"unknown stage stages.denoisr; did you mean 'denoiser'") as caught:
        check_tables(placed, {"denoisr": None})
    assert caught.value.field == "stages.denoisr"


def test_patterns_choose_which_parameters_of_a_role_are_trained():
    method = torch.nn.Module()
    method.model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("up", "down", "out")})
    method.other = torch.nn.Linear(2, 2)
    select_parameters(method, Stage("a", 1, ("model",), trains={"model": ("up.*", "out.bias")}))
    trained = {name for name, value in method.named_parameters() if value.requires_grad}
    assert trained == {"model.up.weight", "model.up.bias", "model.out.bias", "other.weight", "other.bias"}
    select_parameters(method, Stage("b", 1, ("model",), trains={"model": ("*",)}))
    assert all(value.requires_grad for value in method.parameters())


class Pulled(Method):
    """Weights that a constant gradient of 3 pulls down in stage `a`, and one of 5 in stages `b` and `c`."""

    Config = Config
    roles = ("model",)
    result = "model"
    restart = False

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, 7.0)

    @classmethod
    def stages(cls, config, steps):
        last = Stage("c", max(steps - 5, 1), ("model",))
        return Stage("a", 2, ("model",)), Stage("b", 3, ("model",), restart=cls.restart), last

    def preview(self, seed):
        return None

    def updates(self, batch, step):
        yield Update("model", self.model.weight.sum() * (3 if self.stage_of(step).name == "a" else 5))


class PulledAnew(Pulled):
    restart = True


def trainer(folder, method: Method, **changes) -> Trainer:
    plain = {"name": "sgd", "lr": 0.1, "betas": [0.0, 0.9]}
    values = {
        "method": "pulled",
        "steps": 8,
        "batch_size": 4,
        "data": {"name": "digits"},
        "optim": {role: plain for role in method.roles},
        "checkpoint_every": 100,
        **changes,
    }
    recipe = load_recipe(values)
    return Trainer(method, build_source(recipe.data), recipe, Run(folder))


def moves(run: Trainer, of=lambda run: run.method.model.weight) -> list[float]:
    """How far each step moves the weight."""
    found = []
    for _ in range(run.recipe.steps):
        run.enter_next()
        before = of(run).detach().clone()
        run.train_step()
        run.step += 1
        found.append(float((before - of(run).detach()).sum()))
    return found


def test_optimisers_go_on_over_a_stage_that_asks_for_nothing(tmp_path):
    momentum = {"name": "sgd", "lr": 0.1, "betas": [0.6, 0.9]}
    expected, velocity = [], 0.0
    for gradient in [3, 3, 5, 5, 5, 5, 5, 5]:
        velocity = 0.6 * velocity + gradient
        expected.append(0.1 * velocity)
    assert moves(trainer(tmp_path, Pulled(), optim={"model": momentum})) == pytest.approx(expected, rel=1e-5)


def test_a_stage_that_restarts_forgets_the_momentum_and_counts_its_rate_from_its_own_start(tmp_path):
    momentum = {"name": "sgd", "lr": 0.1, "betas": [0.6, 0.9], "warmup_steps": 2}
    found = moves(trainer(tmp_path, PulledAnew(), optim={"model": momentum}))
    expected, velocity = [], 0.0
    for gradient, rate in [(3, 0.05), (3, 0.1), (5, 0.05), (5, 0.1), (5, 0.1), (5, 0.1), (5, 0.1), (5, 0.1)]:
        velocity = 0.0 if (gradient, rate) == (5, 0.05) else velocity
        velocity = 0.6 * velocity + gradient
        expected.append(rate * velocity)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_stage_s_own_optimiser_is_used_in_it_alone(tmp_path):
    own = {"name": "sgd", "lr": 0.04, "betas": [0.0, 0.9], "warmup_steps": 4}
    run = trainer(tmp_path, Pulled(), stages={"b": {"optim": {"model": own}}})
    rates = [0.1, 0.1, 0.01, 0.02, 0.03, 0.1, 0.1, 0.1]
    gradients = [3, 3, 5, 5, 5, 5, 5, 5]
    assert moves(run) == pytest.approx([r * g for r, g in zip(rates, gradients)], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"stages": {"b": {"optim": {"model": {"lr": 0.04}}}}}])
def test_sharding_is_refused_where_a_stage_begins_with_other_optimisers(changes, tmp_path):
    method = Pulled() if changes else PulledAnew()
    recipe = trainer(tmp_path, method, **changes).recipe
    placed = place_stages(method.stages(None, 8), 8)
    with pytest.raises(ConfigError, match="sharding cannot follow stage b") as caught:
        check_sharded(placed, recipe.stages)
    assert caught.value.field == "sharding"
    check_sharded(place_stages(Pulled.stages(None, 8), 8), {})


class Grows(Method):
    """In stage `b` a second network is built, as wide as the first one's weights are by then large, and trained."""

    Config = Config
    roles = ("model",)
    result = "model"
    held = ("record",)

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 3))
        self.record = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
        torch.nn.init.constant_(self.record.weight, -1.0)
        self.entered: list[str] = []

    @classmethod
    def stages(cls, config, steps):
        return Stage("a", 3, ("model",)), Stage("b", max(steps - 3, 1), ("model",), streams=("evens",))

    @property
    def evens(self):
        return build_source({"name": "digits", "only": [2, 4, 8]})

    def enter(self, stage, shapes=None):
        self.entered.append(f"{stage.name} {'resumed' if shapes else 'new'}")
        width = shapes["model/1.weight"][0] if shapes else 2 + int(self.model[0].weight.abs().sum()) % 5
        self.model.append(torch.nn.Linear(3, width))
        if not shapes:
            self.record.weight.fill_(float(width))

    def preview(self, seed):
        return None

    def updates(self, batch, step):
        x = batch.x0.flatten(1)
        if "evens" in batch.also:
            x = x + batch.also["evens"].x0.flatten(1)
        loss = self.model(x + torch.randn(64)).square().mean()
        yield Update("model", loss, {"others": float(len(batch.also))})


def growing(folder, **changes) -> Trainer:
    torch.manual_seed(11)
    adam = {"model": {"name": "adam", "lr": 0.01, "betas": [0.7, 0.9]}}
    return trainer(folder, Grows(), steps=7, optim=adam, ema={"model": 0.8}, **changes)


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_a_run_that_is_stopped_in_either_stage_ends_as_one_that_is_not(stop, tmp_path):
    straight = growing(tmp_path / "straight")
    straight.train()
    polls = iter([False] * stop + [True])
    assert growing(tmp_path / "stopped").train(lambda: next(polls)).step == stop
    resumed = growing(tmp_path / "stopped")
    resumed.train()
    assert resumed.method.entered == (["b new"] if stop <= 3 else ["b resumed"])
    assert float(resumed.method.record.weight) == float(straight.method.record.weight) > 0
    for name, value in straight.method.model.state_dict().items():
        assert torch.equal(resumed.method.model.state_dict()[name], value), name
    with resumed.averaged(), straight.averaged():
        for name, value in straight.method.model.state_dict().items():
            assert torch.equal(resumed.method.model.state_dict()[name], value), name


def test_what_a_stage_begins_with_is_checkpointed_before_its_first_step(tmp_path):
    run = growing(tmp_path)
    polls = iter([False] * 3 + [True])
    run.train(lambda: next(polls))
    run = growing(tmp_path)
    run.resume()
    run.enter_next()
    step, tensors = load_latest(run.run.checkpoints, method="pulled")
    assert (step, int(tensors["loop"]["stage"])) == (3, 1)
    again = growing(tmp_path)
    again.resume()
    assert (again.placed.stage.name, again.method.entered) == ("b", ["b resumed"])


def test_a_checkpoint_that_does_not_name_its_stage_is_of_that_of_its_last_step(tmp_path):
    """As those of the first release: what the stage began with must not be made again from what it trained."""
    run = growing(tmp_path)
    polls = iter([False] * 5 + [True])
    run.train(lambda: next(polls))
    step, tensors = load_latest(run.run.checkpoints, method="pulled")
    del tensors["loop"]
    save_checkpoint(run.run.checkpoints, step, tensors, method="pulled", keep=1)
    again = growing(tmp_path)
    again.resume()
    assert (again.step, again.placed.stage.name, again.method.entered) == (5, "b", ["b resumed"])
    assert float(again.method.record.weight) == float(run.method.record.weight)


def test_a_held_network_that_is_missing_in_a_checkpoint_is_said(tmp_path):
    run = growing(tmp_path)
    run.checkpoint()
    step, tensors = load_latest(run.run.checkpoints, method="pulled")
    del tensors["record.held"]
    save_checkpoint(run.run.checkpoints, step, tensors, method="pulled", keep=1)
    with pytest.raises(ArtifactError, match="does not fit this recipe"):
        growing(tmp_path).resume()


def test_a_stream_gives_a_batch_to_each_micro_batch_of_its_stage_with_a_seed_of_its_own(tmp_path):
    run = growing(tmp_path, accumulate=2)
    assert all(batch.also == {} for batch in run.batches.of(0, run.draw()))
    run.enter(run.stages[1])
    for position, batch in zip((6, 7), run.batches.of(3, run.draw()), strict=True):
        drawn = batch.also["evens"]
        seed = derive(run.recipe.seed, "stream", "evens")
        expected = run.method.evens.batch(2, epoch_seed=seed, position=position)
        assert torch.equal(drawn.x0, expected.x0)
        assert set(drawn.cond["class_label"].tolist()) <= {2, 4, 8}
    same_seed = run.method.evens.batch(2, epoch_seed=run.recipe.seed, position=7)
    assert not torch.equal(drawn.index, same_seed.index)


def test_a_stage_that_changes_nothing_keeps_layout_and_optimisers(tmp_path):
    run = trainer(tmp_path, Pulled())
    strategy, optimizers = run.strategy, run.optimizers
    run.enter(run.stages[1])
    assert run.strategy is strategy
    assert run.optimizers is optimizers
    assert type(run.strategy) is Replicated

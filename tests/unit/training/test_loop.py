"""The training loop around the smallest real methods."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from distill_core.config import Config
from distill_core.data import build_source
from distill_core.errors import ArtifactError, ConfigError, DivergedError, Unavailable
from distill_core.method import Method, Update
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import OptimConfig
from distill_core.training.checkpoint import complete_checkpoints, load_latest, save_checkpoint
from distill_core.training.loop import Trainer
from distill_core.training.optimizers import build_optimizer, learning_rate
from distill_core.training.run_folder import Run
from distill_core.training.seeding import derive


class Mean(Method):
    """Learns the mean picture: deterministic, so that micro-batches can be compared with the whole batch."""

    Config = Config
    roles = ("model",)
    result = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(64, 1)
        torch.nn.init.constant_(self.model.weight, 0.01)
        torch.nn.init.zeros_(self.model.bias)

    def preview(self, seed):
        return None

    def updates(self, batch, step):
        for _ in range(2):
            yield Update("model", (self.model(batch.x0.flatten(1)) - 1).square().mean())


class Noisy(Mean):
    """Of every step another loss, which depends on the weights and on the random numbers that it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def updates(self, batch, step):
        noise = torch.randn(64)
        self.drawn.append(float(noise[0]))
        yield Update("model", (self.model(batch.x0.flatten(1) + noise) - 1).square().mean())


class TwoRoles(Method):
    """A step of `first`, then two of `second`, whose gradients are known: 3 and 4, and what `first` is by then."""

    Config = Config
    roles = ("first", "second")
    result = "first"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Weights(2), Weights(3)

    def preview(self, seed):
        return None

    def updates(self, batch, step):
        yield Update("first", (self.first.values * torch.tensor([3.0, 4.0])).sum())
        for _ in range(2):
            yield Update("second", self.second.values.sum() * self.first.values.sum())


class Weights(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.ones(count))


class Explodes(Mean):
    def updates(self, batch, step):
        yield Update("model", self.model.weight.sum() * (float("nan") if step == 3 else 1.0))


def trainer(folder, method=None, **changes) -> Trainer:
    values = {
        "method": "mean",
        "steps": 6,
        "batch_size": 16,
        "data": {"name": "digits"},
        "optim": {"model": {"name": "sgd", "lr": 0.01, "betas": [0.0, 0.9]}},
        "checkpoint_every": 2,
        **changes,
    }
    recipe = load_recipe(values)
    return Trainer(method or Mean(), build_source(recipe.data), recipe, Run(folder))


def weights(run: Trainer) -> torch.Tensor:
    return run.method.model.weight.detach().clone()


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path):
    whole, parts = trainer(tmp_path / "a"), trainer(tmp_path / "b", accumulate=4)
    whole.train()
    parts.train()
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)
    assert not torch.allclose(weights(whole), torch.full((1, 64), 0.01), atol=1e-3)


def test_a_non_finite_loss_names_role_step_and_last_checkpoint(tmp_path):
    with pytest.raises(
        DivergedError, match=r"loss of model became nan at step 3; the last checkpoint is of step 2"
    ):
        trainer(tmp_path, Explodes()).train()


def test_an_average_keeps_its_decay_of_what_was_before_and_is_put_in_place_and_taken_out_again(tmp_path):
    run = trainer(tmp_path, TwoRoles(), ema={"second": 0.8}, optim=sgd(first=0.01, second=0.02))
    expected, value, first = 1.0, 1.0, 2.0
    for _ in range(3):
        first -= 0.01 * (3 + 4)
        for _ in range(2):
            value -= 0.02 * first
            expected = 0.8 * expected + 0.2 * value
        run.train_step()
    assert run.method.second.values.tolist() == pytest.approx([value] * 3)
    with run.averaged():
        assert run.method.second.values.tolist() == pytest.approx([expected] * 3)
        assert run.method.first.values.sum().item() == pytest.approx(first)
    assert run.method.second.values.tolist() == pytest.approx([value] * 3)


def sgd(**rates: float) -> dict[str, object]:
    return {role: {"name": "sgd", "lr": rate, "betas": [0.0, 0.9]} for role, rate in rates.items()}


def test_every_update_moves_its_own_role_by_its_own_gradient(tmp_path):
    run = trainer(tmp_path, TwoRoles(), optim=sgd(first=0.01, second=0.02))
    for step in (1, 2):
        run.train_step()
        assert run.method.first.values.tolist() == pytest.approx([1 - 0.03 * step, 1 - 0.04 * step])
    sums = [2 - 0.07 * step for step in (1, 2)]
    assert run.method.second.values.tolist() == pytest.approx([1 - 0.02 * 2 * sum(sums)] * 3)


def test_a_group_of_parameters_moves_at_its_own_share_of_the_rate(tmp_path):
    optim = sgd(first=0.01, second=0.02)
    optim["first"]["groups"] = [{"match": "val*", "lr_scale": 1.7}]
    run = trainer(tmp_path, TwoRoles(), optim=optim)
    run.train_step()
    assert run.method.first.values.tolist() == pytest.approx([1 - 0.051, 1 - 0.068])


@pytest.mark.parametrize(("clip", "length"), [(2.5, 2.5), (7.0, 5.0)])
def test_a_gradient_longer_than_the_clip_is_shortened_to_it(clip, length, tmp_path):
    optim = sgd(first=0.01, second=0.02)
    optim["first"]["grad_clip"] = clip
    run = trainer(tmp_path, TwoRoles(), optim=optim)
    run.train_step()
    moved = 1 - run.method.first.values.detach()
    assert moved.tolist() == pytest.approx([0.01 * length * 0.6, 0.01 * length * 0.8], rel=1e-4)


def test_the_logged_loss_is_the_mean_over_all_items(tmp_path):
    whole, parts = (trainer(tmp_path, accumulate=count).train_step() for count in (1, 4))
    assert float(parts["model_loss"]) == pytest.approx(float(whole["model_loss"]), rel=1e-5)


def test_a_resumed_run_draws_what_an_undisturbed_one_draws_and_ends_with_its_weights_and_averages(tmp_path):
    """With momentum, an average, and another noise in every step; bit for bit."""
    changes = {"ema": {"model": 0.8}, "optim": {"model": {"name": "adam", "lr": 0.01, "betas": [0.7, 0.9]}}}
    straight = trainer(tmp_path / "straight", Noisy(), **changes)
    straight.train()
    polls = iter([False] * 3 + [True])
    stopped = trainer(tmp_path / "stopped", Noisy(), **changes)
    assert stopped.train(lambda: next(polls)).step == 3
    resumed = trainer(tmp_path / "stopped", Noisy(), **changes)
    resumed.train()
    assert stopped.method.drawn + resumed.method.drawn == straight.method.drawn
    assert len(set(straight.method.drawn)) == 6
    assert torch.equal(weights(resumed), weights(straight))
    with resumed.averaged(), straight.averaged():
        assert torch.equal(weights(resumed), weights(straight))


def test_metrics_are_lines_of_json_and_a_resumed_run_writes_none_twice(tmp_path):
    polls = iter([False] * 3 + [True])
    assert trainer(tmp_path, log_every=1).train(lambda: next(polls)).stopped
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 9')  # a kill cut this line off
    trainer(tmp_path, log_every=1).train()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ArtifactError, match="of the method 'mean', the recipe says 'other'"):
        load_latest(tmp_path / "checkpoints", method="other")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    trainer(tmp_path).train()
    other = Mean()
    other.model = torch.nn.Linear(32, 1)
    with pytest.raises(ArtifactError, match="does not fit this recipe"):
        trainer(tmp_path, other, steps=8).train()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    trainer(tmp_path).train()
    newest = complete_checkpoints(tmp_path / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"cut")
    step, _ = load_latest(tmp_path / "checkpoints", method="mean")
    assert step == 4


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept_and_the_newest_of_all_is_read(keep, tmp_path):
    trainer(tmp_path, checkpoint_every=1, keep_checkpoints=keep).train()
    kept = [int(folder.name) for folder in complete_checkpoints(tmp_path / "checkpoints")]
    assert kept == [4, 5, 6][-keep:]
    assert load_latest(tmp_path / "checkpoints", method="mean")[0] == 6


def test_a_derived_seed_has_63_bits_and_is_always_the_same():
    """Published models were trained with these very numbers."""
    assert derive(7, 3, "eval") == 6202763160411957947
    many = [derive(7, step, rank) for step in range(500) for rank in range(4)]
    assert len(set(many)) == 2000
    assert 2**62 < max(many) < 2**63


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    class Unwritable(dict):
        def items(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(Unavailable, match="cannot write the checkpoint of step 1 to .*: No space left"):
        save_checkpoint(tmp_path, 1, {"model": Unwritable()}, method="mean", keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optim": {"modle": {}}}, "unknown role optim.modle; did you mean 'model'"),
        ({"ema": {"x": 0.5}}, "unknown role ema.x"),
        ({"accumulate": 3}, "not divisible by accumulate"),
    ],
)
def test_a_recipe_that_does_not_fit_the_method_is_refused_before_step_one(changes, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        trainer(tmp_path, **changes)


def test_learning_rates_are_functions_of_the_step():
    optim = load_recipe("edm_digits").optim["teacher"]
    assert learning_rate(optim, 0, 3000) == pytest.approx(optim.lr / optim.warmup_steps)
    assert learning_rate(optim, optim.warmup_steps, 3000) == pytest.approx(optim.lr)
    assert learning_rate(optim, 3000, 3000) == pytest.approx(optim.lr * optim.final_lr_ratio)


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("constant", [0.1, 0.3, 0.5, 0.5, 0.5]),
        ("cosine", [0.1, 0.3, 0.5, 0.1 + 0.4 * 0.75, 0.1]),
        ("exponential", [0.1, 0.3, 0.5, 0.5 * 0.2 ** (1 / 3), 0.1]),
    ],
)
def test_a_rate_rises_over_the_warm_up_and_then_falls_as_its_decay_says(decay, rates):
    optim = OptimConfig(lr=0.5, warmup_steps=5, decay=decay, final_lr_ratio=0.2)
    found = [learning_rate(optim, step, 35) for step in (0, 2, 5, 15, 35)]
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_setting_of_an_optimiser_reaches_it(name):
    config = OptimConfig(name=name, lr=0.03, betas=(0.7, 0.95), eps=1e-5, weight_decay=0.02)
    layer = torch.nn.Linear(3, 2)
    (group,) = build_optimizer(layer, list(layer.parameters()), config).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.03, 0.02)
    if name == "sgd":
        assert group["momentum"] == 0.7
    else:
        assert (group["betas"], group["eps"]) == ((0.7, 0.95), 1e-5)


def test_groups_of_parameters_momentum_and_milestones_are_what_the_recipe_says():
    layer = torch.nn.Linear(3, 2)
    config = OptimConfig.parse(
        {
            "name": "sgd",
            "lr": 0.03,
            "momentum": 0.85,
            "nesterov": True,
            "weight_decay": 0.02,
            "decay": "milestones",
            "milestones": [0.25, 0.6],
            "gamma": 0.3,
            "groups": [{"match": "*bias", "lr_scale": 1.7, "weight_decay": 0.0}],
        }
    )
    biases, rest = build_optimizer(layer, list(layer.parameters()), config).param_groups
    assert (biases["params"], biases["lr_scale"], biases["weight_decay"]) == ([layer.bias], 1.7, 0.0)
    assert (rest["params"], rest["weight_decay"]) == ([layer.weight], 0.02)
    assert (rest["momentum"], rest["nesterov"]) == (0.85, True)
    found = [learning_rate(config, step, 40) for step in (0, 9, 10, 23, 24, 39)]
    assert found == pytest.approx([0.03, 0.03, 0.009, 0.009, 0.0027, 0.0027])


@pytest.mark.slow
def test_two_processes_take_the_step_of_the_whole_batch(tmp_path):
    """Mean gradients over gloo processes equal one process on all items."""
    script = tmp_path / "rank.py"
    script.write_text(
        dedent(
            f"""
            import json
            from pathlib import Path
            from tests.unit.training.test_loop import Noisy, trainer
            folder = Path({str(tmp_path)!r})
            run = trainer(folder / "two")
            run.train()
            noisy = trainer(folder / "noisy", Noisy())
            polls = iter([False] * 2 + [noisy.accelerator.process_index == 1] * 9)
            stopped = noisy.train(lambda: next(polls))
            found = {{
                "processes": run.accelerator.num_processes,
                "weights": run.method.model.weight[0].tolist(),
                "drawn": noisy.method.drawn,
                "stopped": stopped.step,
            }}
            (folder / f"rank-{{run.accelerator.process_index}}.json").write_text(json.dumps(found))
            """
        )
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script)],
        capture_output=True,
        text=True,
        env=_environment(),
    )
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank-*.json"))]
    assert len(ranks) == 2, done.stderr[-2000:]
    one = trainer(tmp_path / "one")
    one.train()
    for rank in ranks:
        assert (rank["processes"], rank["stopped"]) == (2, 2)
        assert rank["weights"] == pytest.approx(weights(one)[0].tolist(), abs=1e-6)
    assert len({*ranks[0]["drawn"], *ranks[1]["drawn"]}) == 4


def _environment() -> dict[str, str]:
    import os

    from tests.helpers import REPOSITORY

    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def test_bfloat16_trains_and_keeps_its_weights_in_float32(tmp_path, context):
    from tests.helpers import tiny_trainer

    run = tiny_trainer("dmd2", context, tmp_path, precision="bf16", accumulate=2)
    values = run.train_step()
    assert all(torch.isfinite(value).all() for value in values.values())
    assert {p.dtype for p in run.method.parameters()} == {torch.float32}


def test_progress_tells_the_rate_in_images_and_the_memory_of_the_gpu(tmp_path):
    told = []
    run = trainer(tmp_path)
    run.run = Run(tmp_path / "run", listener=told.append)
    run.train()
    last = [event for event in told if event["event"] == "progress"][-1]
    assert last["images_per_second"] == pytest.approx(16 * last["rate"], rel=0.01)
    assert (last["gpu_memory_bytes"] > 0) == torch.cuda.is_initialized()


def test_a_resumed_run_tells_the_rate_of_its_own_steps_and_the_time_that_is_left(tmp_path, monkeypatch):
    polls = iter([False] * 2 + [True])
    assert trainer(tmp_path, steps=8).train(lambda: next(polls)).step == 2
    told, run = [], trainer(tmp_path, steps=8)
    run.run = Run(tmp_path, listener=told.append)
    seconds = itertools.count(100.0, 0.5)  # half a second from look to look, so 2 steps a second
    monkeypatch.setattr("distill_core.training.meter.time.monotonic", lambda: next(seconds))
    run.train()
    progress = [(e["step"], e["rate"], e["eta_s"]) for e in told if e["event"] == "progress"]
    assert progress == [
        (3, 2.0, 2.5),
        (4, 2.0, 2.0),
        (5, 2.0, 1.5),
        (6, 2.0, 1.0),
        (7, 2.0, 0.5),
        (8, 2.0, 0.0),
    ]

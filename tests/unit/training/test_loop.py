"""The training loop around the smallest real methods."""

from __future__ import annotations

import json
import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from distill_core.config import Config, load_recipe
from distill_core.data import build_source
from distill_core.errors import ArtifactError, ConfigError, DivergedError, Unavailable
from distill_core.method import Method, Update
from distill_core.training.checkpoint import complete_checkpoints, load_latest, save_checkpoint
from distill_core.training.loop import Trainer
from distill_core.training.optimizers import learning_rate
from distill_core.training.run import Run


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


def test_ema_weights_are_put_in_place_and_taken_out_again(tmp_path):
    run = trainer(tmp_path, ema={"model": 0.5})
    run.train()
    trained = weights(run)
    with run.averaged():
        averaged = weights(run)
    assert torch.equal(weights(run), trained)
    assert not torch.equal(averaged, trained)


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


def test_two_processes_take_the_step_of_the_whole_batch(tmp_path):
    """Mean gradients over gloo processes equal one process on all items."""
    script = tmp_path / "rank.py"
    script.write_text(
        dedent(
            f"""
            import json
            from pathlib import Path
            from tests.unit.training.test_loop import trainer
            folder = Path({str(tmp_path)!r})
            run = trainer(folder / "two")
            run.train()
            total = run.method.model.weight.detach().double().sum().item()
            found = {{"processes": run.accelerator.num_processes, "total": total}}
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
        timeout=200,
    )
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank-*.json"))]
    assert len(ranks) == 2, done.stderr[-2000:]
    one = trainer(tmp_path / "one")
    one.train()
    for rank in ranks:
        assert rank["processes"] == 2
        assert rank["total"] == pytest.approx(weights(one).double().sum().item(), abs=1e-5)


def _environment() -> dict[str, str]:
    import os

    from tests.helpers import REPOSITORY

    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


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

"""`Update(role, None)`: the method changed the role itself; the loop checks, takes over and logs what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from distill_core.config import Config
from distill_core.errors import ConfigError, DivergedError
from distill_core.method import Method, Update
from tests.unit.training.test_loop import _environment, trainer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)
        self.norm = nn.BatchNorm1d(2)
        nn.init.constant_(self.layer.weight, 0.25)


class Solves(Method):
    """Puts its weights where they belong, 1.7 a step further each time, and does not train them."""

    Config = Config
    roles = ("model", "other")
    result = "model"

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.model, self.other, self.broken = Network(), nn.Linear(1, 1, bias=False), broken
        nn.init.constant_(self.other.weight, 0.75)

    @torch.no_grad()
    def updates(self, batch, step):
        self.model.layer.weight.fill_(1.7 * (step + 1))
        self.model.norm.running_mean.fill_(0.3 * (step + 1))
        if self.broken and step == 2:
            self.model.state_dict()[self.broken].view(-1)[0] = float("nan")
        yield Update("model", None, {"residual": 0.125 * (step + 1)})


class Reports(Solves):
    """Says how far it is and changes nothing."""

    def updates(self, batch, step):
        yield Update("", None, {"ranked": 3.0 + step})
        yield Update("other", self.other.weight.sum() * 2)


def solving(folder: Path, method: Method | None = None, **changes):
    plain = {"name": "sgd", "lr": 0.05, "betas": [0.0, 0.9]}
    values = {"optim": {"other": plain}, "ema": {"model": 0.8}, **changes}
    return trainer(folder, method or Solves(), **values)


def test_what_the_method_found_is_neither_stepped_nor_averaged(tmp_path):
    run = solving(tmp_path)
    for step in range(3):
        run.step = step
        assert {name: float(value) for name, value in run.train_step().items()} == {
            "residual": 0.125 * (step + 1)
        }
    for enter in (False, True):
        with run.averaged() if enter else torch.no_grad():
            assert run.method.model.layer.weight.tolist() == [[pytest.approx(5.1)] * 3]
            assert run.method.model.norm.running_mean.tolist() == [pytest.approx(0.9)] * 2
    assert run.method.other.weight.item() == 0.75


def test_a_closed_form_is_refused_in_micro_batches(tmp_path):
    with pytest.raises(
        ConfigError, match="changes model in a closed form, which no micro-batches share; set accumulate = 1"
    ) as caught:
        solving(tmp_path, accumulate=2).train_step()
    assert caught.value.field == "accumulate"
    with pytest.raises(ConfigError, match="changes its state in a closed form"):
        solving(tmp_path, Reports(), accumulate=2).train_step()


@pytest.mark.parametrize("broken", ["layer.weight", "norm.running_var"])
def test_what_is_not_finite_ends_the_run_and_is_not_kept(broken, tmp_path):
    run = solving(tmp_path, Solves(broken), checkpoint_every=1)
    with pytest.raises(
        DivergedError,
        match=r"what the method found for model is not finite at step 2; the last checkpoint is of step 2",
    ):
        run.train()
    with run.averaged():
        assert run.method.model.layer.weight.tolist() == [[pytest.approx(3.4)] * 3]


def test_a_report_changes_nothing_and_stands_beside_other_roles(tmp_path):
    run = solving(tmp_path, Reports())
    values = run.train_step()
    assert {name: float(value) for name, value in values.items()} == {"ranked": 3.0, "other_loss": 1.5}
    assert run.method.model.layer.weight.tolist() == [[0.25] * 3]
    assert run.method.other.weight.item() == pytest.approx(0.75 - 0.05 * 2)


@pytest.mark.slow
def test_two_processes_keep_what_the_first_of_them_found(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        dedent(
            f"""
            import json
            from pathlib import Path
            import torch
            from distill_core.method import Update
            from tests.unit.training.test_closed_form import Solves, solving

            class Differs(Solves):
                @torch.no_grad()
                def updates(self, batch, step):
                    self.model.layer.weight.fill_(2.5 + batch.index.double().mean())
                    self.model.norm.running_mean.fill_(batch.index.double().mean())
                    yield Update("model", None)

            run = solving(Path({str(tmp_path)!r}) / "run", Differs(), steps=1)
            (batch,) = run.batches.of(0, run.draw())
            run.train()
            with run.averaged():
                average = float(run.method.model.layer.weight[0, 0])
            found = {{
                "own": float(batch.index.double().mean()),
                "weight": float(run.method.model.layer.weight[0, 0]),
                "mean": float(run.method.model.norm.running_mean[1]),
                "average": average,
            }}
            rank = run.accelerator.process_index
            (Path({str(tmp_path)!r}) / f"rank-{{rank}}.json").write_text(json.dumps(found))
            """
        )
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, env=_environment())
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert done.returncode == 0, done.stderr[-2000:]
    assert first["own"] != second["own"]
    for rank in (first, second):
        assert rank["weight"] == rank["average"] == pytest.approx(2.5 + first["own"])
        assert rank["mean"] == pytest.approx(first["own"])

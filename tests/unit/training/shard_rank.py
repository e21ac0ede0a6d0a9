"""Trainings that shard, in one of two processes: `distill_core.job.launch 2 tests.unit.training.shard_rank SPEC`.

Each process goes through all of `SCENES` in one group, and leaves what it found in `rank-N.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_core import api
from distill_core.config import Config
from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.method import Method, Update
from distill_core.radiance.rendering.occupancy import OccupancyGrid
from distill_core.recipe import load_recipe
from distill_core.reductions import over_processes
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run
from tests.helpers import tiny_recipe
from tests.unit.training.test_scale_out import ROOM, Hungry

WIDTH = 65  # which two processes cannot halve


class Net(nn.Module):
    """Blocks in a list, a frozen part, and a second way in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16 * 16, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 3 * 16 * 16)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        found = [self.first(x)]
        for block in self.blocks:
            found.append(found[-1] + torch.tanh(block(found[-1])))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.features(x)[-1]))


class Pair(Method):
    """A student and its critic, which call each other in the ways that methods do."""

    Config = Config
    roles = ("critic", "student")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.student, self.critic = Net(), Net()

    def preview(self, seed: int) -> Tensor:
        return self.student(torch.zeros(2, 768)).detach().reshape(2, 3, 16, 16).clamp(-1, 1)

    def updates(self, batch, step):
        x0 = batch.x0.flatten(1)
        with torch.no_grad():
            fake = self.student(x0 + torch.randn_like(x0))
        yield Update("critic", (self.critic(fake) - fake).square().mean() - self.critic(x0).mean())
        fake = self.student(self.student(x0 + torch.randn_like(x0)))  # two calls in one graph
        through = self.critic.features(fake)[1].square().mean()  # of the critic a part, whose weights stay
        yield Update("student", (fake - x0).square().mean() + 0.1 * through)


class ReadsWeights(Pair):
    def updates(self, batch, step):
        x0 = batch.x0.flatten(1)
        yield Update("student", (x0 @ self.student.first.weight.T).square().mean())


class OnlyWeights(Pair):
    def updates(self, batch, step):
        yield Update("student", self.teacher(batch.x0.flatten(1)).square().mean())

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net()


class SharedWeights(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.critic.last = self.student.last


class HeldElsewhere(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.outside = (nn.Linear(WIDTH, WIDTH),)  # as low-rank adapters hold their base
        self.outside[0].weight = self.student.blocks[0].weight


class OneNumber(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.student.temperature = nn.Parameter(torch.tensor(1.0))


class Uneven(Hungry):
    """The second process has less room, and all sum a figure over processes in each step."""

    def __init__(self) -> None:
        super().__init__(room=ROOM // (1 + torch.distributed.get_rank()))

    def updates(self, batch, step):
        yield from super().updates(batch, step)
        over_processes(torch.ones(()))


def trainer(folder: Path, method: type[Method] = Pair, **changes: Any) -> Trainer:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process has written what the last training left
    values = {
        "method": "pair",
        "steps": 6,
        "batch_size": 8,
        "accumulate": 2,
        "processes": 2,
        "data": {"name": "shapes"},
        "ema": {"student": 0.5},
        "optim": {
            "critic": {"lr": 1e-3},
            "student": {"name": "sgd", "lr": 0.05, "betas": [0.9, 0.9], "grad_clip": 0.5},
        },
        "sample_every": 4,
        "checkpoint_every": 3,
        **changes,
    }
    recipe = load_recipe(values)
    made = Trainer(method(), build_source(recipe.data), recipe, Run(folder))
    made._preview = lambda: (
        made.method.preview(0) if hasattr(made.method, "preview") else None
    )  # its kind has none
    return made


def equals_replicated(folder: Path) -> dict[str, Any]:
    trainer(folder / "replicated").train()
    run = trainer(folder / "sharded", sharding="fsdp")
    run.train()
    return {
        "shares": shares(run),
        "modules": sorted({type(m).__name__ for m in run.method.student.modules()}),
    }


def shares(run: Trainer) -> dict[str, float]:
    """This process's part of the bytes: of weights, optimiser state and EMA."""
    weights = [p for role in run.parameters.values() for p in role]
    state = [v for o in run.optimizers.values() for s in o.state.values() for v in s.values() if v.ndim]
    average = [v for ema in run.emas.values() for v in ema.weights.values() if isinstance(v, DTensor)]

    def share(tensors: list[Tensor]) -> float:
        return sum(t.to_local().nbytes for t in tensors) / sum(t.numel() * t.element_size() for t in tensors)

    return {"weights": share(weights), "optimizer": share(state), "ema": share(average)}


def resumes(folder: Path) -> dict[str, Any]:
    polls = iter([False] * 4 + [True])
    stopped = trainer(folder / "stopped", sharding="fsdp", checkpoint_every=100)
    assert stopped.train(lambda: next(polls)).stopped
    trainer(folder / "stopped", sharding="fsdp").train()
    return {}


def changes_layout(folder: Path) -> dict[str, Any]:
    for before, after in ((None, "fsdp"), ("fsdp", None)):
        polls = iter([False] * 3 + [True])
        name = folder / f"from-{before}"
        trainer(name, sharding=before).train(lambda: next(polls))  # noqa: B023
        trainer(name, sharding=after).train()
    return {}


def refuses(folder: Path) -> dict[str, Any]:
    said = {}
    for method in (ReadsWeights, OnlyWeights, SharedWeights, HeldElsewhere, OneNumber):
        try:
            trainer(folder / method.__name__, method, sharding="fsdp").train()
        except ConfigError as error:
            said[method.__name__] = [str(error), error.field]
    return said


def publishes(folder: Path) -> dict[str, Any]:
    """The whole way of a shipped recipe: a transformer of diffusers, measured and saved by the first process."""
    recipe = tiny_recipe("edm_digits", processes=2, sharding="fsdp", sample_every=2)
    result = api.train(recipe, folder / "edm", api.context(folder / "store", folder / "cache"))
    return {"main": result.main, "figures": sorted(result.figures)}


def sees_one_grid(folder: Path) -> dict[str, Any]:
    torch.manual_seed(torch.distributed.get_rank())
    grid = OccupancyGrid(8, bound=1.0, delta=0.1)
    grid.update(lambda positions: 4 * positions.norm(dim=-1), every_cell=False)
    return {"grid": grid.density.flatten().tolist()}


def fits_together(folder: Path) -> dict[str, Any]:
    run = trainer(folder / "uneven", Uneven, micro_batch="auto", batch_size=32, accumulate=1, ema={}, optim={},
                  steps=1, data={"name": "digits"})  # fmt: skip
    run.train()
    return {"accumulate": run.accumulate}


SCENES: tuple[Callable[[Path], dict[str, Any]], ...] = (
    equals_replicated,
    resumes,
    changes_layout,
    refuses,
    publishes,
    sees_one_grid,
    fits_together,
)


def main() -> int:
    folder = Path(json.loads(Path(sys.argv[1]).read_text())["run_dir"])
    torch.set_num_threads(1)
    found = {}
    for scene in SCENES:
        torch.manual_seed(0)
        found[scene.__name__] = scene(folder)
    (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    print(json.dumps({"event": "result"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

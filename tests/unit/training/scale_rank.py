"""A tiny training, one of several processes: `distill_core.job.launch 2 tests.unit.training.scale_rank SPEC`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from distill_core.config import Config
from distill_core.data import build_source
from distill_core.errors import EXIT_STOPPED
from distill_core.method import Method, Update
from distill_core.recipe import load_recipe
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run


class Noisy(Method):
    """Learns from pictures and noise, with momentum: any step that is missed or doubled shows in the weights."""

    Config = Config
    roles = ("model",)
    result = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(3 * 16 * 16, 1)
        torch.nn.init.constant_(self.model.weight, 0.01)
        torch.nn.init.zeros_(self.model.bias)

    def preview(self, seed):
        return None

    def updates(self, batch, step):
        x0 = batch.x0.flatten(1)
        yield Update("model", (self.model(x0 + torch.randn_like(x0)) - 1).square().mean())


def trainer(folder: Path, **changes) -> Trainer:
    values = {
        "method": "noisy",
        "steps": 6,
        "batch_size": 8,
        "data": {"name": "shapes"},
        "ema": {"model": 0.5},
        "optim": {"model": {"lr": 0.01}},
        "checkpoint_every": 100,
        **changes,
    }
    recipe = load_recipe(values)
    return Trainer(Noisy(), build_source(recipe.data), recipe, Run(folder))


def main() -> int:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    run = trainer(Path(task["run_dir"]))
    polls = 0

    def should_stop() -> bool:
        nonlocal polls
        polls += 1
        return run.accelerator.process_index == 1 and polls == task.get(
            "stop_at"
        )  # one process alone is told

    outcome = run.train(should_stop)
    print(
        json.dumps({"event": "result", "step": outcome.step, "world": run.accelerator.num_processes}),
        flush=True,
    )
    return EXIT_STOPPED if outcome.stopped else 0


if __name__ == "__main__":
    sys.exit(main())

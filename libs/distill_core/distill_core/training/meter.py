"""Progress and metrics of a running loop: rate, time left, memory; to the run's listener, its file and TensorBoard."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from distill_core.recipe import Recipe
from distill_core.training.run_folder import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Meter:
    """Progress with rate and time left, told at most four times a second; metrics to file and TensorBoard."""

    def __init__(self, run: Run, recipe: Recipe, start: int, *, main: bool = True) -> None:
        self.batch_size = recipe.batch_size
        self.run, self.steps, self.start, self.began, self.reported = (
            run,
            recipe.steps,
            start,
            time.monotonic(),
            0.0,
        )
        self.board = _tensorboard(run) if main else None

    def tick(self, step: int) -> None:
        now = time.monotonic()
        if now - self.reported < 0.25 and step < self.steps:
            return
        self.reported = now
        rate = (step - self.start) / max(now - self.began, 1e-9)
        self.run.tell(
            "progress",
            step=step,
            steps=self.steps,
            rate=round(rate, 3),
            eta_s=round((self.steps - step) / rate, 1),
            images_per_second=round(rate * self.batch_size, 2),
            gpu_memory_bytes=torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.run.metrics(step, finite)
        if self.board is not None:
            for name, value in finite.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def _tensorboard(run: Run) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # metrics.jsonl has everything; TensorBoard is a convenience
        return None
    return SummaryWriter(str(run.folder / "tensorboard"))

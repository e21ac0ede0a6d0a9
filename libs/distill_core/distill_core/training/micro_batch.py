"""`micro_batch = "auto"`: into how many micro-batches a step is split so that it fits into memory."""

from __future__ import annotations

import gc
import logging
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill_core.errors import out_of_memory
from distill_core.recipe import Recipe
from distill_core.reductions import alone
from distill_core.training.strategy import Parts

log = logging.getLogger(__name__)


class Steps(Protocol):
    """Interface of a trainer whose steps can be tried and taken back."""

    recipe: Recipe
    accelerator: Accelerator
    parameters: dict[str, list[nn.Parameter]]
    accumulate: int
    alone: bool  # this process steps without the others

    def train_step(self) -> Any: ...

    def tensors(self) -> Parts: ...

    def load(self, tensors: Parts) -> None: ...


def fitting_accumulate(trainer: Steps) -> int:
    """The smallest `accumulate`, doubled from the recipe's on, with which a step fits into the memory of every process.

    Each try is a whole step, of which nothing is kept. Raises what the device raises where no split helps.
    """
    before = {part: _on_cpu(values) for part, values in trainer.tensors().items()}
    world = trainer.accelerator.num_processes
    tried = trainer.accumulate
    while not _fits(trainer, tried, last=trainer.recipe.batch_size % (2 * tried * world) != 0):
        trainer.load(before)
        tried *= 2
    trainer.load(before)
    if world > 1:
        agreed = torch.tensor([tried], device=trainer.accelerator.device)
        tried = int(trainer.accelerator.gather(agreed).max())
    if tried != trainer.recipe.accumulate:
        log.info("a step fits into memory as %d micro-batches", tried)
    return tried


def _fits(trainer: Steps, accumulate: int, *, last: bool) -> bool:
    """Whether a step of this process alone fits; `last`: there is nothing smaller to try."""
    trainer.accumulate, trainer.alone = accumulate, True
    try:
        with alone():
            trainer.train_step()
        return True
    except Exception as error:
        if out_of_memory(error) is None or last:
            raise
    finally:
        trainer.alone = False
        for parameters in trainer.parameters.values():
            for parameter in parameters:
                parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in values.items()}

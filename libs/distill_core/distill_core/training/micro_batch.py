"""`micro_batch = "auto"`: into how many micro-batches a step is split so that it fits into memory."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill_core.errors import out_of_memory
from distill_core.losses.matching import alone

if TYPE_CHECKING:
    from distill_core.training.loop import Trainer

log = logging.getLogger(__name__)
Parts = dict[str, dict[str, Tensor]]


def fitting_accumulate(trainer: Trainer) -> int:
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


def _fits(trainer: Trainer, accumulate: int, *, last: bool) -> bool:
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

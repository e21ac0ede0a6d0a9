"""What a DMD2 step costs beside its network passes: noise, losses, optimisers, EMA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from distill_core.training.loop import Trainer

RECIPE, TEACHER = "dmd2", "edm_digits"
WARM_UP = 3


def measure_trainer(work: Path, steps: int, tell: Callable[[int, int], object]) -> dict[str, Any]:
    """Medians over `steps` steps of the recipe, its teacher untrained."""
    import torch

    from distill_core import api
    from distill_core.building import build
    from distill_core.config import load_recipe
    from distill_core.training.loop import Trainer
    from distill_core.training.run import Run

    torch.set_num_threads(1)
    where = api.context(work / "store", work / "cache")
    method, _ = build(load_recipe(TEACHER), where)
    method.save_result(work / "teacher")
    recipe = load_recipe(RECIPE, {"teacher.path": str(work / "teacher")})
    method, source = build(recipe, where)
    trainer = Trainer(method, source, recipe, Run(work / "run"))
    timed = []
    for step in range(WARM_UP + steps):
        with _passes(trainer) as passes:
            began = time.perf_counter()
            trainer.train_step()
            timed.append({"step": time.perf_counter() - began, **passes})
        tell(step + 1, WARM_UP + steps)
    middle = {name: statistics.median(entry[name] for entry in timed[WARM_UP:]) for name in timed[0]}
    networks = middle["forward"] + middle["backward"]
    return {
        "recipe": RECIPE,
        "batch_size": recipe.batch_size,
        "threads": 1,
        "num_passes": int(middle["passes"]),
        "step_ms": 1000 * middle["step"],
        "forward_ms": 1000 * middle["forward"],
        "backward_ms": 1000 * middle["backward"],
        "step_over_passes": middle["step"] / networks,
    }


@contextmanager
def _passes(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Seconds spent inside the networks' forward and backward passes, and how many of both there were."""
    spent = {"forward": 0.0, "backward": 0.0, "passes": 0}
    started: list[float] = []

    def before(*_: object) -> None:
        started.append(time.perf_counter())

    def after(*_: object) -> None:
        spent["forward"] += time.perf_counter() - started.pop()
        spent["passes"] += 1

    backward = trainer.accelerator.backward

    def timed_backward(*args: Any, **options: Any) -> None:
        began = time.perf_counter()
        backward(*args, **options)
        spent["backward"] += time.perf_counter() - began
        spent["passes"] += 1

    hooks = []
    for network in networks_of(trainer.method):
        hooks += [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    trainer.accelerator.backward = timed_backward
    try:
        yield spent
    finally:
        del trainer.accelerator.backward  # the class's own method shows again
        for hook in hooks:
            hook.remove()


def networks_of(module: nn.Module) -> list[nn.Module]:
    """The outermost diffusers networks in a method."""
    if type(module).__module__.startswith("diffusers."):
        return [module]
    return [network for child in module.children() for network in networks_of(child)]

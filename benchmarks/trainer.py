"""What a training step costs beside its network passes: noise, losses, optimisers, EMA. For every diffusion method.

A method is found by its file, its recipe by name; nothing is listed here. The passes are watched in a run of the
very step that is timed, not declared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_core.context import Context
    from distill_core.recipe import Recipe
    from distill_core.training.loop import Trainer

FAMILY = "diffusion"
LIMIT = 1.10  # of step over passes
WARM_UP = 3


def measure_trainer(
    work: Path, steps: int, tell: Callable[[int, int], object], names: list[str] | None = None
) -> list[dict[str, Any]]:
    """A row for each method: medians over `steps` steps of its recipe, every model it begins with untrained."""
    import torch

    from distill_core import api
    from distill_core.errors import DistilleryError
    from distill_core.recipe import load_recipe

    torch.set_num_threads(1)
    context = api.untrained(api.context(work / "store", work / "cache"), work / "untrained")
    rows = []
    chosen = names or benched_recipes()
    for number, name in enumerate(chosen):
        recipe = load_recipe(name)

        def told(step: int, number: int = number) -> None:
            tell(number * (WARM_UP + steps) + step, len(chosen) * (WARM_UP + steps))

        row: dict[str, Any] = {"method": recipe.method, "recipe": name, "batch_size": recipe.batch_size}
        try:
            row |= _measured(_trainer(recipe, context, work / name), steps, told)
        except DistilleryError as error:  # one method that breaks off hides no other
            row["error"] = str(error)
        rows.append(row)
    return rows


def benched_recipes() -> list[str]:
    """A recipe for each method of the family that needs no path: the one of its name, else the first."""
    from distill_core import api

    chosen = []
    for entry in api.describe_methods():
        own = [name for name in entry["recipes"] if _is_self_contained(name)]
        if entry["family"] == FAMILY and own:
            chosen.append(entry["name"] if entry["name"] in own else own[0])
    return chosen


def _is_self_contained(name: str) -> bool:
    from distill_core.recipe import load_recipe

    recipe = load_recipe(name)
    models = (recipe.teacher, recipe.student.source, recipe.extractor)
    sources = [
        (recipe.data or {}).get("path"),
        *(model and (model.path or model.artifact) for model in models),
    ]
    return not any(sources)


def _trainer(recipe: Recipe, context: Context, folder: Path) -> Trainer:
    from distill_core.building import build
    from distill_core.training.loop import Trainer
    from distill_core.training.run_folder import Run

    if recipe.pairs is not None:  # how they are made is no part of a step
        recipe = recipe.override({"pairs.num_steps": 1})
    method, source = build(recipe, context)
    return Trainer(method, source, recipe, Run(folder))


def _measured(trainer: Trainer, steps: int, told: Callable[[int], object]) -> dict[str, Any]:
    """Each step three times: watched, timed, and as bare passes; a step's shape depends on its number alone."""
    from benchmarks.network_passes import Pass, passes_of_a_step

    def bare(passes: list[Pass]) -> float:
        with trainer.accelerator.autocast():
            return sum(_seconds(network_pass.repeat) for network_pass in passes)

    timed: list[tuple[float, float, int, int]] = []
    for turn in range(WARM_UP + steps):
        trainer.step = (
            max(0, turn - WARM_UP) * (trainer.recipe.steps - 1) // steps
        )  # over all of a method's phases
        passes = passes_of_a_step(trainer)
        first = (
            bare(passes) if turn % 2 else None
        )  # by turns before and after: a machine slows down and recovers
        whole = _seconds(trainer.train_step)
        differentiated = sum(network_pass.differentiated for network_pass in passes)
        counts = len(passes) - differentiated, differentiated
        timed.append((whole, bare(passes) if first is None else first, *counts))
        told(turn + 1)
    kept = timed[WARM_UP:]
    return {
        "forward_passes": statistics.median(forward for _, _, forward, _ in kept),
        "differentiated_passes": statistics.median(backward for _, _, _, backward in kept),
        "step_ms": 1000 * statistics.median(whole for whole, _, _, _ in kept),
        "passes_ms": 1000 * statistics.median(alone for _, alone, _, _ in kept),
        "step_over_passes": statistics.median(whole / alone for whole, alone, _, _ in kept),
    }


def _seconds(work: Callable[[], object]) -> float:
    import torch

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began

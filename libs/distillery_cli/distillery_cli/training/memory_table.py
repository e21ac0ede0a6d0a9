"""The table of `distillery train --dry-run`: what a run needs of memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distill_core.errors import ConfigError
from distillery_cli.terminal.output import emit_json, notes, results, table

if TYPE_CHECKING:
    from distill_core.training.memory import MemoryPlan, Part

COLUMNS = ["network", "parameters", "trained", "weights", "shared", "gradients", "optimiser", "EMA"]


def show_plan(plan: MemoryPlan, *, as_json: bool) -> int:
    """Print a plan.

    Raises:
        ConfigError: the GPU of this machine cannot hold it. Too little memory beside a CPU is only a warning.
    """
    from distill_core.training.memory import too_large, training_device

    device = training_device()
    problem = too_large(plan, device)
    if as_json:
        sums = {"standing": plan.standing, "total": plan.total, "fits": problem is None}
        emit_json({**asdict(plan), **sums, "device": device._asdict()})
    else:
        results.print(table(COLUMNS, [_row(part) for part in plan.parts], title="memory"))
        results.print(f"activations: {size(plan.activations)}, the most that one backward pass needs")
        results.print(
            f"at the peak of a step: {size(plan.total)} = {size(plan.standing)} that stays (weights, optimiser, EMA) "
            f"+ {size(plan.step)} (activations, gradients, temporaries); leave a tenth for the allocator"
        )
    if problem and device.is_gpu:
        raise ConfigError(problem, field="batch_size")
    if problem:
        notes.print(f"warning: {problem}")
    return 0


def _row(part: Part) -> list[Any]:
    counts = [f"{part.parameters / 1e6:.2f} M", f"{part.trained / 1e6:.2f} M" if part.role else ""]
    sizes = (part.weights, part.shared, part.gradients, part.optimizer, part.ema)
    return [part.name, *counts, *(size(value) if value else "" for value in sizes)]


def size(count: float) -> str:
    """Bytes for people: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"

"""Dry run of jobs: what they would need, before they are queued. Nothing is trained, published or kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core import api
from distill_core.context import Context
from distill_core.errors import DistilleryError
from distill_core.kinds import find_card
from distill_core.kinds.convertible import check_convertible
from distill_core.recipe import Recipe
from distill_core.recipe.references import check_job
from distill_core.training.memory import Unplannable, too_large, training_device


@dataclass(frozen=True)
class _Job:
    """One job as `spec.json` of a dry run lists it."""

    name: str
    kind: str
    spec: dict[str, Any]
    waits_for: tuple[str, ...] = ()  # stages whose results it needs, which do not exist yet


def dry_run(spec: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """Look at the jobs of `spec` one by one and tell of each; 0.

    Raises:
        DistilleryError: the first job that could not succeed; `field` is its key, the sentence names its stage.
    """
    context = api.context(spec["store"], Path(spec["cache"]))
    for values in spec["jobs"]:
        job = _Job(values["name"], values["kind"], values["spec"], tuple(values.get("waits_for", ())))
        try:
            if not job.waits_for and job.kind != "convert":  # a conversion names no file
                check_job(job.spec, spec.get("roots"), context.store)
            report = _checked(job, context)
        except DistilleryError as error:
            named = type(error)(f"{job.name}: {error}" if len(spec["jobs"]) > 1 else str(error))
            named.field = error.field
            raise named from None
        tell({"event": "plan", "name": job.name, "kind": job.kind, **report})
    return 0


def _checked(job: _Job, context: Context) -> dict[str, Any]:
    if job.waits_for:
        stages = ", ".join(job.waits_for)
        return {"note": f"data and memory were not looked at: it needs what {stages} will publish"}
    if job.kind == "train":
        return _training(Recipe.parse(job.spec["recipe"]), context)
    model = context.store.manifest(job.spec["artifact"])
    if job.kind == "evaluate":
        find_card(model.kind).Evaluate.parse(job.spec.get("evaluate", {}), where="evaluate")
    elif job.kind == "convert":
        check_convertible(model, job.spec["target"])
    return {"note": f"{model.ref} exists; its memory was not planned: only training is"}


def _training(recipe: Recipe, context: Context) -> dict[str, Any]:
    device = training_device()
    report = {"device": device.name, "device_bytes": device.memory}
    try:
        plan = api.plan(recipe, context)
    except Unplannable as error:
        return {**report, "note": str(error)}
    problem = too_large(plan, device)
    measured = {"memory_bytes": plan.total, "standing_bytes": plan.standing, "fits": problem is None}
    return {**report, **measured, "note": problem or ""}

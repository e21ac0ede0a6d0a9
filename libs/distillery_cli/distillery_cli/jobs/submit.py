"""`distillery submit`: a training run, a sweep of them, or a pipeline, for the workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError
from distill_core.recipe import parse_overrides
from distillery_cli.jobs.listing import client, follow, show_submitted
from distillery_cli.jobs.sweeps import could_be_value
from distillery_cli.jobs.values import job_values
from distillery_cli.terminal.output import AsJson, Overrides, emit_json, notes, results, table
from distillery_cli.terminal.parsing import parse_labels, split_sweep
from distillery_cli.training.memory_table import size

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import Job, Plan
    from distillery_trainer.client import Work


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery submit edm_digits --watch"
        "  ·  distillery submit dmd2 -s teacher.artifact=edm-digits --dry-run"
        "  ·  distillery submit dmd2 --sweep optim.student.lr=1e-4,3e-4"
        "  ·  distillery submit --pipeline digits.toml"
        "  ·  all keys: distillery reference"
    )(submit)


def submit(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name, or a .toml file.")] = None,
    overrides: Overrides = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B,…", help="A run for each value; may be repeated."),
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option("--pipeline", metavar="FILE", help="A .toml file of stages.")
    ] = None,
    name: Annotated[str, typer.Option(help="A name to find it by.")] = "",
    priority: Annotated[int, typer.Option(help="-1000 to 1000, higher first.")] = 0,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    idempotency_key: Annotated[str, typer.Option(help="The same key again gives the first job again.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at recipe, data and memory; queue nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--watch", help="Show its progress until it ends.")] = False,
    as_json: AsJson = False,
) -> int:
    """Queue a training run, or a pipeline of jobs, for the workers. `--sweep KEY=A,B` queues a run for each value.

    `-s KEY=A,B` is the same where KEY takes no such text; a path or a title may hold commas and is one value.
    """
    from distillery.v1.jobs_pb2 import SweepSpec

    if (recipe is None) == (pipeline is None):
        raise ConfigError("give either a RECIPE or --pipeline FILE", field="recipe")
    if pipeline is not None and (overrides or sweep):
        raise ConfigError(
            "-s and --sweep go with a RECIPE; a pipeline's stages have their own `set` tables", field="set"
        )
    if pipeline is not None:
        work, called = _pipeline(pipeline)
    else:
        work, called = _training(recipe or "", overrides or [], sweep or []), ""
    options = {"name": name or called, "priority": priority, "idempotency_key": idempotency_key}
    options |= {"labels": parse_labels(label or [])}
    if isinstance(work, SweepSpec) and wait:
        raise ConfigError("--watch follows one job; a sweep's are shown by `distillery jobs`", field="watch")
    with client() as api:
        if dry_run:
            _show_plans(api.dry_run(work, **options), as_json)
            return 0
        if isinstance(work, SweepSpec):
            _show_sweep(api.sweep(work, **options), as_json)
            return 0
        job = api.submit(work, **options)
        if wait:
            return follow(api, job, as_json)
        show_submitted(job, as_json)
    return 0


def _training(recipe: str, overrides: list[str], sweep: list[str]) -> Work:
    from distillery_trainer.client import sweep_spec, train_spec

    def is_value(key: str, text: str) -> bool:
        taken = could_be_value(recipe, key, text, (item for item in overrides if "," not in item))
        if taken:
            note = f"{key} = {text!r} is one value; a run for each of several is --sweep {key}=A,B"
            notes.print(note)
        return taken

    single, axes = split_sweep(overrides, sweep, is_value=is_value)
    work = train_spec(recipe, parse_overrides(single))
    return sweep_spec(work, axes) if axes else work


def _pipeline(path: Path) -> tuple[Work, str]:
    from distillery_cli.jobs.pipelines import pipeline_message, read_pipeline

    read = read_pipeline(path)
    return pipeline_message(read, path.parent), read.name


def _show_sweep(jobs: list[Job], as_json: bool) -> None:
    if as_json:
        return emit_json([job_values(job) for job in jobs])
    results.print(table(["id", "name"], [[job.id, job.name] for job in jobs]))
    return results.print(f"{len(jobs)} jobs; compare them with: distillery compare {jobs[0].id}")


def _show_plans(plans: list[Plan], as_json: bool) -> None:
    """Say what each job would need.

    A job that the server's device cannot hold is told, and no error: a worker may have another device.
    """
    if as_json:
        return emit_json([_plan_values(plan) for plan in plans])
    columns = ["job", "memory", "of it standing", "device", "has"]
    rows = [
        [
            plan.name,
            *(size(value) if value else "" for value in (plan.memory_bytes, plan.standing_bytes)),
            plan.device,
            size(plan.device_bytes) if plan.device_bytes else "",
        ]
        for plan in plans
    ]
    results.print(table(columns, rows))
    for plan in plans:
        if plan.note:
            notes.print(f"{plan.name}: {plan.note}")
    return results.print(f"{len(plans)} would be queued; nothing was")


def _plan_values(plan: Plan) -> dict[str, Any]:
    from distillery.v1 import jobs_pb2

    values: dict[str, Any] = {field.name: getattr(plan, field.name) for field in plan.DESCRIPTOR.fields}
    return {**values, "kind": jobs_pb2.JobKind.Name(plan.kind).removeprefix("JOB_KIND_").lower()}

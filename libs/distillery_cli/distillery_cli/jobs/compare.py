"""`distillery compare`: the results of jobs that have a label in common, beside what differs between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError, NotFound, nearest
from distillery_cli.jobs.listing import client
from distillery_cli.jobs.values import state_name
from distillery_cli.terminal.output import AsJson, emit_json, results, table
from distillery_cli.terminal.parsing import parse_labels

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import Job

SWEEP = "sweep"
MAX_JOBS = 1000
_SHOWN = 6  # metrics, where none is chosen


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery compare 3f9a0c1d2b4e --by frechet_distance  ·  distillery compare team=images"
    )(compare)


def compare(
    label: Annotated[str, typer.Argument(metavar="LABEL", help="A sweep's first job, or KEY=VALUE.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Show this figure; may be repeated. Without it, all.")
    ] = None,
    by: Annotated[str, typer.Option(help="Sort by this figure, the smallest first.")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare the results of a sweep, or of all jobs with a label: what differs between them, and their figures."""
    labels = parse_labels([label]) if "=" in label else {SWEEP: label}
    with client() as api:
        jobs = api.list(labels=labels, limit=MAX_JOBS)[::-1]
    if not jobs:
        raise NotFound(f"no job has the label {label!r}; `distillery jobs` lists them", field="label")
    rows = [_row(job) for job in jobs]
    names = sorted({name for row in rows for name in row["metrics"]})
    for name in (*(metric or []), *([by] if by else [])):
        if name not in names and names:
            raise ConfigError(f"no job has the figure {name!r}{nearest(name, names)}", field="metric")
    if by:
        rows.sort(key=lambda row: row["metrics"].get(by, math.inf))
    if as_json:
        return emit_json(rows)
    return _show(rows, metric or ([by] if by else []) + [name for name in names if name != by][:_SHOWN])


def _row(job: Job) -> dict[str, Any]:
    """A job's labels and figures; those of a job that has not ended are its last."""
    figures = dict(job.metrics or job.progress.metrics)
    labels = {key: value for key, value in sorted(job.labels.items()) if key != SWEEP}
    step = job.progress.step
    return {
        "id": job.id,
        "name": job.name,
        "state": state_name(job),
        "step": step,
        "labels": labels,
        "metrics": figures,
    }


def _show(rows: list[dict[str, Any]], metrics: list[str]) -> None:
    keys = sorted({key for row in rows for key in row["labels"]})
    differing = [key for key in keys if len({row["labels"].get(key) for row in rows}) > 1]
    cells = [
        [
            row["id"],
            *(row["labels"].get(key, "") for key in differing),
            row["state"],
            *(row["metrics"].get(name, "") for name in metrics),
        ]
        for row in rows
    ]
    results.print(table(["id", *differing, "state", *metrics], cells))

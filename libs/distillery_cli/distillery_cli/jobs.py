"""`distillery submit`, `jobs`, `watch`, `cancel` and `retry`: work through the Jobs API."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core import errors
from distill_core.config import parse_overrides
from distill_core.errors import EXIT_OUT_OF_MEMORY, EXIT_STOPPED, ConfigError, meaning
from distillery_cli.output import (
    AsJson,
    Bar,
    Bars,
    Overrides,
    duration,
    emit_json,
    figure,
    notes,
    results,
    table,
)

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import Job, WatchResponse
    from distillery_trainer.client import JobsClient

EXIT_DETACHED = 130
Id = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as `distillery jobs` shows it.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery submit edm_digits --watch"
        "  ·  distillery submit dmd2 -s teacher.artifact=edm-digits"
        "  ·  distillery submit --pipeline digits.toml"
    )(submit)
    app.command(
        epilog="Examples: distillery jobs  ·  distillery jobs --state running  ·  distillery jobs ID"
    )(jobs)
    app.command(epilog="Examples: distillery watch ID  ·  distillery watch ID --log")(watch)
    app.command(epilog="Example: distillery cancel ID")(cancel)
    app.command(epilog="Example: distillery retry ID --watch")(retry)


def client() -> JobsClient:
    """A client of the Jobs API that the settings name."""
    from distillery_trainer.client import JobsClient

    return JobsClient()


def submit(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name, or a .toml file.")] = None,
    overrides: Overrides = None,
    pipeline: Annotated[
        Path | None, typer.Option("--pipeline", metavar="FILE", help="A .toml file of stages.")
    ] = None,
    name: Annotated[str, typer.Option(help="A name to find it by.")] = "",
    priority: Annotated[int, typer.Option(help="-1000 to 1000, higher first.")] = 0,
    idempotency_key: Annotated[str, typer.Option(help="The same key again gives the first job again.")] = "",
    wait: Annotated[bool, typer.Option("--watch", help="Show its progress until it ends.")] = False,
    as_json: AsJson = False,
) -> int:
    """Queue a training run, or a pipeline of jobs, for the workers."""
    if (recipe is None) == (pipeline is None):
        raise ConfigError("give either a RECIPE or --pipeline FILE", field="recipe")
    if pipeline is not None and overrides:
        raise ConfigError(
            "-s goes with a RECIPE; a pipeline's stages have their own `set` tables", field="set"
        )
    with client() as api:
        from distillery_trainer.client import train_spec

        work: Any
        if pipeline is not None:
            from distillery_cli.pipelines import pipeline_message, read_pipeline

            read = read_pipeline(pipeline)
            work, name = pipeline_message(read, pipeline.parent), name or read.name
        else:
            work = train_spec(recipe or "", parse_overrides(overrides or []))
        job = api.submit(work, name=name, priority=priority, idempotency_key=idempotency_key)
        if wait:
            return follow(api, job, as_json)
        show_submitted(job, as_json)
    return 0


def show_submitted(job: Job, as_json: bool) -> None:
    """Say what was queued, and what to do next."""
    if as_json:
        return emit_json(job_values(job))
    return results.print(f"{job.id} {job.name} {state_name(job)}; follow it with: distillery watch {job.id}")


def jobs(
    job_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Show one job; without it, all.")
    ] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="train, convert, evaluate or pipeline.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=10_000, help="The newest so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the jobs, newest first, or show one of them."""
    from distillery.v1 import jobs_pb2

    with client() as api:
        if job_id is not None:
            job = api.get(job_id)
            return emit_json(job_values(job)) if as_json else _show(job)
        states = [_enum(jobs_pb2.JobState, "JOB_STATE", value, "state") for value in state or []]
        kinds = [_enum(jobs_pb2.JobKind, "JOB_KIND", value, "kind") for value in kind or []]
        found = api.list(states=states, kinds=kinds, limit=limit)
    if as_json:
        return emit_json([job_values(job) for job in found])
    if not found:
        return results.print("no jobs; `distillery submit edm_digits` queues one")
    columns = ["id", "name", "kind", "state", "progress", "artifact", "error"]
    return results.print(table(columns, [_row(job) for job in found]))


def _enum(kind: Any, prefix: str, value: str, field: str) -> int:
    known = {name.removeprefix(f"{prefix}_").lower(): number for name, number in kind.items() if number}
    if value.lower() not in known:
        raise ConfigError(
            f"{field} {value!r} is not known{errors.nearest(value.lower(), known)}", field=field
        )
    return known[value.lower()]


def _row(job: Job) -> list[str]:
    progress = f"{job.progress.step}/{job.progress.steps}" if job.progress.steps else ""
    if job.stages:
        done = sum(state_name(stage) == "SUCCEEDED" for stage in job.stages)
        progress = f"{done}/{len(job.stages)} stages"
    return [job.id, job.name, kind_name(job), state_name(job), progress, job.artifact, job.error.message]


def _show(job: Job) -> None:
    shown = [job, *job.stages]
    results.print(
        table(["id", "name", "kind", "state", "progress", "artifact", "error"], [_row(one) for one in shown])
    )
    if job.metrics:
        results.print(
            table(["metric", "value"], [[name, figure(value)] for name, value in sorted(job.metrics.items())])
        )
    if job.error.log_tail:
        results.print(job.error.log_tail, markup=False)


def watch(
    job_id: Id,
    log: Annotated[bool, typer.Option("--log", help="Show the job's log too.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show a job's progress until it ends. Ctrl-C stops watching, not the job."""
    with client() as api:
        return follow(api, api.get(job_id), as_json, with_log=log)


def cancel(job_id: Id, as_json: AsJson = False) -> None:
    """Stop a job within a step; its checkpoint is kept and `retry` continues it."""
    with client() as api:
        job = api.cancel(job_id)
    said = f"{job.id} {state_name(job)}" + (", cancel requested" if state_name(job) == "RUNNING" else "")
    emit_json(job_values(job)) if as_json else results.print(said)


def retry(
    job_id: Id,
    wait: Annotated[bool, typer.Option("--watch", help="Show its progress until it ends.")] = False,
    as_json: AsJson = False,
) -> int:
    """Queue a failed or cancelled job again; it continues from its last checkpoint."""
    with client() as api:
        job = api.retry(job_id)
        if wait:
            return follow(api, job, as_json)
        show_submitted(job, as_json)
    return 0


def follow(api: JobsClient, job: Job, as_json: bool = False, *, with_log: bool = False) -> int:
    """Show a job until it ends, then its outcome; the exit code that the outcome means."""
    try:
        if as_json:
            for response in api.watch(job.id, with_log=with_log):
                emit_json(response_values(response))
            ended = api.get(job.id)
            emit_json(job_values(ended))
        else:
            ended = shown_until_end(api, job, with_log=with_log)
            _show_outcome(ended)
    except KeyboardInterrupt:
        notes.print(f"\nno longer watching; the job goes on. To come back: distillery watch {job.id}")
        return EXIT_DETACHED
    return exit_code(ended)


def shown_until_end(
    api: JobsClient,
    job: Job,
    *,
    with_log: bool = False,
    hear: Callable[[WatchResponse], None] = lambda response: None,
) -> Job:
    """Progress bars of a job and its stages until it ends; `hear` gets every message. The ended job."""
    with Bars() as bars:
        view = _View(bars)
        view.take_job(job)
        for response in api.watch(job.id, with_log=with_log):
            view.take(response)
            hear(response)
    return api.get(job.id)


class _View:
    """One bar per job that does something."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._lines: dict[str, Bar] = {}
        self._names: dict[str, str] = {}
        self._began: dict[str, float] = {}

    def take_job(self, job: Job) -> None:
        for one in (job, *job.stages):
            self._names[one.id] = one.stage or one.name or one.id

    def take(self, response: WatchResponse) -> None:
        """Show one message of a Watch."""
        kind = response.WhichOneof("event")
        if kind == "job":
            self.take_job(response.job)
        elif kind == "change":
            self._change(response)
        elif kind == "progress":
            progress = response.progress
            line = self._line(response.job_id)
            line.update(progress.step, progress.steps, rate=progress.rate, eta_s=progress.eta_seconds)
        elif kind == "metrics":
            self._line(response.job_id).tell({"event": "metrics", "values": dict(response.metrics.values)})
        elif kind == "log":
            notes.print(response.log.rstrip("\n"), markup=False, style="dim")

    def _line(self, job_id: str) -> Bar:
        if job_id not in self._lines:
            self._lines[job_id] = self._bars.add(f"{self._names.get(job_id, job_id):<10}")
            self._began[job_id] = time.monotonic()
        return self._lines[job_id]

    def _change(self, response: WatchResponse) -> None:
        what, job_id = response.change.what, response.job_id
        if what == "claimed":
            self._line(job_id)
        elif what in ("succeeded", "failed", "cancelled") and job_id in self._lines:
            self._lines[job_id].done(f"{what} after {duration(time.monotonic() - self._began[job_id])}")
        elif what in ("crashed", "lease_expired", "preempted"):
            notes.print(f"{self._names.get(job_id, job_id)}: {what}: {response.change.message}", markup=False)


def _show_outcome(job: Job) -> None:
    results.print(f"{job.name}: {state_name(job)}" + (f", published {job.artifact}" if job.artifact else ""))
    for one in job.stages or [job]:
        label = f"{one.stage}: " if one.stage else ""
        shown = "  ".join(f"{name} {figure(value)}" for name, value in sorted(one.metrics.items()))
        if shown:
            results.print(f"  {label}{shown}")


def exit_code(job: Job) -> int:
    """0 for a job that succeeded; else its error's own code, the sentence told on stderr."""
    name = state_name(job)
    if name == "SUCCEEDED":
        return 0
    notes.print(f"[bold red]error:[/] job {job.id} is {name}")
    if job.error.message:
        notes.print(job.error.message, markup=False, soft_wrap=True)
        notes.print(f"when that is mended: distillery retry {job.id}")
    if name == "CANCELLED":
        return EXIT_STOPPED
    if job.error.type == "OutOfMemory":
        return EXIT_OUT_OF_MEMORY
    cls = getattr(errors, job.error.type, errors.DistilleryError)
    known = isinstance(cls, type) and issubclass(cls, errors.DistilleryError)
    return meaning(
        cls("") if known and cls is not errors.Overloaded else errors.DistilleryError("")
    ).exit_code


def state_name(job: Job) -> str:
    """QUEUED, RUNNING, SUCCEEDED, FAILED or CANCELLED."""
    from distillery.v1 import jobs_pb2

    return jobs_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")


def kind_name(job: Job) -> str:
    """Train, convert, evaluate or pipeline, in lower case."""
    from distillery.v1 import jobs_pb2

    return jobs_pb2.JobKind.Name(job.kind).removeprefix("JOB_KIND_").lower()


def job_values(job: Job) -> dict[str, Any]:
    """A job as JSON values: short enum names, numbers as numbers."""
    values = _values(job)
    values |= {"state": state_name(job), "kind": kind_name(job)}
    if job.stages:
        values["stages"] = [job_values(stage) for stage in job.stages]
    return values


def response_values(response: WatchResponse) -> dict[str, Any]:
    """A message of a Watch as JSON values."""
    values = _values(response)
    if response.WhichOneof("event") == "job":
        values["job"] = job_values(response.job)
    return values


def _values(message: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return _with_numbers(MessageToDict(message, preserving_proto_field_name=True))


_INT64 = {"step", "steps", "event", "metrics_offset", "log_offset"}


def _with_numbers(values: Any) -> Any:
    """Proto's JSON writes 64-bit integers as strings; readers expect numbers."""
    if isinstance(values, list):
        return [_with_numbers(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: int(value) if key in _INT64 and isinstance(value, str) else _with_numbers(value)
        for key, value in values.items()
    }

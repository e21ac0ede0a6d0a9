"""`distillery jobs`, `watch`, `cancel` and `retry`: what was queued, through the Jobs API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core import errors
from distill_core.errors import EXIT_OUT_OF_MEMORY, EXIT_STOPPED, ConfigError, codes_of
from distillery_cli.jobs.values import job_values, kind_name, response_values, state_name
from distillery_cli.terminal.output import (
    AsJson,
    Bar,
    Bars,
    duration,
    emit_json,
    figure,
    notes,
    results,
    styled,
    table,
)
from distillery_cli.terminal.parsing import parse_labels, parse_moment

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import Job, Sample, WatchCursor, WatchResponse
    from distillery_trainer.client import JobsClient

EXIT_DETACHED = 130
Id = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as `distillery jobs` shows it.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery jobs --state running  ·  distillery jobs --label team=images --since 2d"
        "  ·  distillery jobs ID"
    )(jobs)
    app.command(epilog="Examples: distillery watch ID --log  ·  distillery watch ID --samples out/samples")(
        watch
    )
    app.command(epilog="Example: distillery cancel ID")(cancel)
    app.command(epilog="Example: distillery retry ID --watch")(retry)


def client() -> JobsClient:
    """A client of the Jobs API that the settings name."""
    from distillery_trainer.client import JobsClient

    return JobsClient()


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
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Has this label.")] = None,
    since: Annotated[str, typer.Option(metavar="TIME", help="Submitted then or later: 2d, 2026-05-31.")] = "",
    until: Annotated[str, typer.Option(metavar="TIME", help="Submitted before that.")] = "",
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
        matches = api.list(
            states=states,
            kinds=kinds,
            labels=parse_labels(label or []),
            created_after=parse_moment(since, "since"),
            created_before=parse_moment(until, "until"),
            limit=limit,
        )
    if as_json:
        return emit_json([job_values(job) for job in matches])
    if not matches:
        return results.print("no jobs; `distillery submit edm_digits` queues one")
    columns = ["id", "name", "kind", "state", "progress", "artifact", "error"]
    return results.print(table(columns, [_row(job) for job in matches], prose=["error"], spare=["kind"]))


def _enum(kind: Any, prefix: str, value: str, field: str) -> int:
    known: dict[str, int] = {
        name.removeprefix(f"{prefix}_").lower(): number for name, number in kind.items() if number
    }
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
    columns = ["id", "name", "kind", "state", "progress", "artifact", "error"]
    results.print(table(columns, [_row(one) for one in shown], prose=["error"], spare=["kind"]))
    if job.metrics:
        results.print(
            table(["metric", "value"], [[name, figure(value)] for name, value in sorted(job.metrics.items())])
        )
    if job.error.log_tail:
        results.print(job.error.log_tail)


def watch(
    job_id: Id,
    log: Annotated[bool, typer.Option("--log", help="Show the job's log too.")] = False,
    samples: Annotated[
        Path | None, typer.Option("--samples", metavar="FOLDER", help="Save its sample pictures there.")
    ] = None,
    start: Annotated[
        str, typer.Option("--from", metavar="CURSOR", help="Go on after a `cursor` that --json printed.")
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Show a job's progress until it ends. Ctrl-C stops watching, not the job."""
    with client() as api:
        job = api.get(job_id)
        cursors = {job.id: _cursor(start)} if start else {}
        return follow(api, job, as_json, with_log=log, samples=samples, cursors=cursors)


def _cursor(text: str) -> WatchCursor:
    from google.protobuf.json_format import Parse, ParseError

    from distillery.v1.jobs_pb2 import WatchCursor

    try:
        return Parse(text, WatchCursor())
    except ParseError:
        raise ConfigError(
            f"cursor {text[:80]!r} is not one; give what `watch --json` printed, e.g. '{{\"event\": 12}}'",
            field="from",
        ) from None


def cancel(job_id: Id, as_json: AsJson = False) -> None:
    """Stop a job within a step; its checkpoint is kept and `retry` continues it."""
    with client() as api:
        job = api.cancel(job_id)
    text = f"{job.id} {state_name(job)}" + (", cancel requested" if state_name(job) == "RUNNING" else "")
    emit_json(job_values(job)) if as_json else results.print(text)


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


def follow(
    api: JobsClient,
    job: Job,
    as_json: bool = False,
    *,
    with_log: bool = False,
    samples: Path | None = None,
    cursors: Mapping[str, WatchCursor] | None = None,
) -> int:
    """Show a job until it ends, then its outcome; the exit code that the outcome means."""
    options: dict[str, Any] = {
        "with_log": with_log,
        "with_samples": samples is not None,
        "cursors": cursors or {},
    }

    def hear(response: WatchResponse) -> None:
        if samples is not None and response.WhichOneof("event") == "sample":
            _save_sample(samples, response.job_id, response.sample)
            response.sample.ClearField("data")

    try:
        if as_json:
            for response in api.watch(job.id, **options):
                hear(response)
                emit_json(response_values(response))
            ended = api.get(job.id)
            emit_json(job_values(ended))
        else:
            ended = shown_until_end(api, job, hear=hear, **options)
            _show_outcome(ended)
    except KeyboardInterrupt:
        notes.print(f"\nno longer watching; the job goes on. To come back: distillery watch {job.id}")
        return EXIT_DETACHED
    return exit_code(ended)


def _save_sample(folder: Path, job_id: str, sample: Sample) -> None:
    if not sample.data:
        notes.print(f"sample {sample.name} is larger than a message may be; it lies in the run folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job_id}-{Path(sample.name).name}").write_bytes(sample.data)


def shown_until_end(
    api: JobsClient,
    job: Job,
    *,
    hear: Callable[[WatchResponse], None] = lambda response: None,
    **options: Any,
) -> Job:
    """Progress bars of a job and its stages until it ends; `hear` gets every message. The ended job."""
    with Bars() as bars:
        view = _View(bars)
        view.take_job(job)
        for response in api.watch(job.id, **options):
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
            notes.print(response.log.rstrip("\n"), style="dim")

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
            notes.print(f"{self._names.get(job_id, job_id)}: {what}: {response.change.message}")


def _show_outcome(job: Job) -> None:
    results.print(f"{job.name}: {state_name(job)}" + (f", published {job.artifact}" if job.artifact else ""))
    for one in job.stages or [job]:
        label = f"{one.stage}: " if one.stage else ""
        shown = "  ".join(f"{name} {figure(value)}" for name, value in sorted(one.metrics.items()))
        if shown:
            results.print(f"  {label}{shown}")


def _may_succeed(job: Job) -> bool:
    """Whether the same job could succeed later: its request stays what it was, and so does a published version."""
    fixed = ("ConfigError", "ArtifactError") if kind_name(job) == "convert" else ("ConfigError",)
    return job.error.type not in fixed


def exit_code(job: Job) -> int:
    """0 for a job that succeeded; else its error's own code, the sentence told on stderr."""
    name = state_name(job)
    if name == "SUCCEEDED":
        return 0
    notes.print(styled(("error:", "bold red"), f" job {job.id} is {name}"))
    if job.error.message:
        notes.print(job.error.message)
        if _may_succeed(job):
            notes.print(f"when that is mended: distillery retry {job.id}")
    if name == "CANCELLED":
        return EXIT_STOPPED
    if job.error.type == "OutOfMemory":
        return EXIT_OUT_OF_MEMORY
    cls = getattr(errors, job.error.type, errors.DistilleryError)
    known = isinstance(cls, type) and issubclass(cls, errors.DistilleryError)
    return codes_of(
        cls("") if known and cls is not errors.Overloaded else errors.DistilleryError("")
    ).exit_code

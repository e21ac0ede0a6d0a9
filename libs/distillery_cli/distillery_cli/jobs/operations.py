"""`distillery queues`, `pause`, `resume` and `gc`: what an operator does to the queues and the disks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distillery_cli.jobs.listing import client
from distillery_cli.terminal.output import AsJson, duration, emit_json, notes, results, table
from distillery_cli.terminal.parsing import parse_age
from distillery_cli.training.memory_table import size

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import CollectGarbageResponse, Queue

QueueName = Annotated[str, typer.Argument(metavar="QUEUE", help="As `distillery queues` shows it.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Example: distillery queues")(queues)
    app.command(epilog="Example: distillery pause train --reason 'driver update'")(pause)
    app.command(epilog="Example: distillery resume train")(resume)
    app.command(epilog="Examples: distillery gc --dry-run  ·  distillery gc --keep 3 --older-than 30d")(gc)


def queues(as_json: AsJson = False) -> None:
    """Show the queues: what waits, what runs, and which are paused."""
    with client() as api:
        known = api.queues()
    _show(list(known), as_json)


def pause(
    queue: QueueName,
    reason: Annotated[str, typer.Option(help="Shown to those who wonder why nothing starts.")] = "",
    as_json: AsJson = False,
) -> None:
    """Start no more jobs of a queue until it is resumed. Those that run go on."""
    with client() as api:
        paused = api.pause(queue, reason)
    _show([paused], as_json)


def resume(queue: QueueName, as_json: AsJson = False) -> None:
    """Let a paused queue go on."""
    with client() as api:
        resumed = api.resume(queue)
    _show([resumed], as_json)


def _show(found: list[Queue], as_json: bool) -> None:
    if as_json:
        return emit_json([_queue_values(queue) for queue in found])
    rows = [[q.name, q.queued, q.running, "paused" if q.paused else "", q.reason, q.who] for q in found]
    return results.print(
        table(["queue", "queued", "running", "state", "reason", "by"], rows, prose=["reason"])
    )


def _queue_values(queue: Queue) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: getattr(queue, field.name) for field in queue.DESCRIPTOR.fields}
    since = queue.since_time.ToDatetime(UTC) if queue.HasField("since_time") else None
    return {**values, "since_time": since.isoformat() if isinstance(since, datetime) else None}


def gc(
    keep: Annotated[
        int, typer.Option(min=1, help="Newest versions of each model, and runs of each name.")
    ] = 3,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="What is younger stays: 12h, 30d.")] = "30d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old run folders and model versions, and uploads that were cut off.

    What an alias, a job that has not ended, or a kept model's parents refer to stays.
    """
    age_s = parse_age(older_than, "older-than")
    with client() as api:
        collected = api.collect_garbage(keep=keep, older_than_s=age_s, dry_run=dry_run)
    if as_json:
        return emit_json(_values(collected, dry_run))
    return _show_garbage(collected, dry_run)


def _kind(value: int) -> str:
    from distillery.v1.jobs_pb2 import Garbage

    return str(Garbage.Kind.Name(value)).removeprefix("KIND_").lower()


def _values(found: CollectGarbageResponse, dry_run: bool) -> dict[str, Any]:
    garbage = [
        {"kind": _kind(g.kind), "name": g.name, "bytes": g.bytes, "age_seconds": g.age_seconds}
        for g in found.garbage
    ]
    kept = {model.name: model.reason for model in found.kept}
    return {"dry_run": dry_run, "garbage": garbage, "bytes": found.bytes, "kept": kept}


def _show_garbage(found: CollectGarbageResponse, dry_run: bool) -> None:
    rows = [[_kind(g.kind), g.name, size(g.bytes), duration(g.age_seconds)] for g in found.garbage]
    if rows:
        results.print(table(["kind", "name", "size", "age"], rows))
    for model in found.kept:
        notes.print(f"kept: {model.name}, {model.reason}")
    verb = "would be removed" if dry_run else "removed"
    results.print(f"{len(rows)} {verb}, {size(found.bytes)}")

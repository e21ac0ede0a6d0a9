"""Between protobuf messages and the job table's own types, in both directions. Nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from distill_core.errors import ConfigError, DistilleryError
from distill_core.recipe import parse_overrides
from distill_service.jobs import specs, watch
from distill_service.jobs.garbage import DEFAULT_KEEP, DEFAULT_OLDER_THAN_S, Collected, Rules
from distill_service.jobs.listing import Filters
from distill_service.jobs.pauses import QueueState
from distill_service.jobs.requests import Record
from distill_service.jobs.specs import Draft
from distill_service.jobs.sweeps import draft_sweep
from distill_service.jobs.table import Event, Job, Kind, State
from distillery.v1 import jobs_pb2


def drafts(request: jobs_pb2.SubmitRequest) -> list[Draft]:
    """The jobs that a request asks for.

    Raises:
        ConfigError: a part of it is wrong; `field` names it.
    """
    which = request.WhichOneof("work")
    if which is None:
        raise ConfigError("give one of train, convert, evaluate, pipeline, sweep", field="work")
    if which == "pipeline":
        return [_stage(stage) for stage in request.pipeline.stages]
    return _sweep(request.sweep) if which == "sweep" else [_draft(getattr(request, which))]


def _sweep(work: jobs_pb2.SweepSpec) -> list[Draft]:
    axes = [(axis.key, list(axis.values)) for axis in work.axes]
    with _shallow():
        return draft_sweep(axes, **_recipe(work.train), overrides=dict(work.train.overrides))


def _stage(stage: jobs_pb2.StageSpec) -> Draft:
    which = stage.WhichOneof("work")
    if which is None:
        field = f"pipeline.stages.{stage.name}"
        raise ConfigError(f"stage {stage.name!r}: give one of train, convert, evaluate", field=field)
    try:
        draft = _draft(getattr(stage, which))
    except DistilleryError as error:
        raise specs.within(stage.name, error) from None
    return Draft(
        draft.kind, draft.spec, draft.name, stage.name, tuple(stage.after), publishes=draft.publishes
    )


def _draft(work: Message) -> Draft:
    with _shallow():
        draft: Draft = _DRAFTS[type(work)](work)
        return draft


@contextmanager
def _shallow() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ConfigError("the request is nested too deeply", field="recipe") from None


def _train(work: jobs_pb2.TrainSpec) -> Draft:
    overrides = parse_overrides(f"{key}={value}" for key, value in work.overrides.items())
    return specs.draft_train(**_recipe(work), overrides=overrides)


def _recipe(work: jobs_pb2.TrainSpec) -> dict[str, str | None]:
    which = work.WhichOneof("recipe")
    return {
        "toml": work.recipe_toml if which == "recipe_toml" else None,
        "name": work.recipe_name if which == "recipe_name" else None,
    }


def _convert(work: jobs_pb2.ConvertSpec) -> Draft:
    tolerance = work.tolerance if work.HasField("tolerance") else None
    return specs.draft_convert({"artifact": work.artifact, "target": work.target, "tolerance": tolerance})


def _evaluate(work: jobs_pb2.EvaluateSpec) -> Draft:
    values: dict[str, Any] = {"artifact": work.artifact, "evaluate": _values(work.evaluate)}
    if work.HasField("data"):
        values["data"] = _values(work.data)
    return specs.draft_evaluate(values)


_DRAFTS: dict[type[Message], Any] = {
    jobs_pb2.TrainSpec: _train,
    jobs_pb2.ConvertSpec: _convert,
    jobs_pb2.EvaluateSpec: _evaluate,
}


def _values(struct: Struct) -> dict[str, Any]:
    return {key: _whole(value) for key, value in json_format.MessageToDict(struct).items()}


def _whole(value: Any) -> Any:
    """A Struct knows no integers: whole numbers become them again."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def filters(request: jobs_pb2.ListRequest) -> Filters:
    """Filters of a List request."""
    return Filters(
        states=states(list(request.states)),
        kinds=kinds(list(request.kinds)),
        labels=dict(request.labels),
        created_after=_moment(request, "created_after"),
        created_before=_moment(request, "created_before"),
    )


def _moment(request: jobs_pb2.ListRequest, field: str) -> float | None:
    if not request.HasField(field):
        return None
    moment: Timestamp = getattr(request, field)
    return moment.seconds + moment.nanos / 1e9


def states(numbers: list[int]) -> list[State]:
    """The states of a List request."""
    return [State(_plain(jobs_pb2.JobState, n, "JOB_STATE_", "states")) for n in numbers]


def kinds(numbers: list[int]) -> list[Kind]:
    """The kinds of a List request."""
    return [Kind(_plain(jobs_pb2.JobKind, n, "JOB_KIND_", "kinds").lower()) for n in numbers]


def _plain(enum: Any, number: int, prefix: str, field: str) -> str:
    if number == 0 or number not in enum.values():
        raise ConfigError(f"{field} holds {number}, which is no known value", field=field)
    return str(enum.Name(number)).removeprefix(prefix)


def watch_options(request: jobs_pb2.WatchRequest) -> watch.Options:
    """Options of a Watch request."""
    cursors = {
        job: watch.Cursor(cursor.event, cursor.metrics_offset, cursor.log_offset, cursor.sample)
        for job, cursor in request.cursors.items()
    }
    return watch.Options(cursors, request.with_samples, request.with_log, request.only_new)


def job_message(record: Record, *, with_spec: bool = False) -> jobs_pb2.Job:
    """A job, and a pipeline's stages."""
    message = _job(record.job)
    message.parents.extend(record.parents)
    message.stages.extend(_job(stage) for stage in record.stages)
    if with_spec:
        message.spec_json = json.dumps(record.job.spec)
    return message


def _job(job: Job) -> jobs_pb2.Job:
    message = jobs_pb2.Job(
        id=job.id,
        name=job.name,
        kind=f"JOB_KIND_{job.kind.upper()}",
        state=state_value(job.state),
        queue=job.queue,
        priority=job.priority,
        labels=job.labels,
        attempt=job.attempt,
        crashes=job.crashes,
        max_attempts=job.max_attempts,
        cancel_requested=job.cancel_requested,
        worker=job.worker,
        progress=_progress(job.progress),
        artifact=job.artifact,
        metrics=_numbers(job.metrics),
        pipeline=job.pipeline or "",
        stage=job.stage,
        owner=job.owner,
        created_time=_time(job.created),
        started_time=_time(job.started),
        finished_time=_time(job.finished),
    )
    if job.error.get("type") or job.error.get("message"):
        message.error.CopyFrom(_error(job.error))
    return message


def state_value(state: str) -> str:
    """The enum's name of a state, as a message takes it."""
    return f"JOB_STATE_{state}"


def _error(error: Mapping[str, Any]) -> jobs_pb2.JobError:
    return jobs_pb2.JobError(
        type=str(error.get("type") or ""),
        message=str(error.get("message") or ""),
        field=str(error.get("field") or ""),
        log_tail=str(error.get("log") or ""),
    )


def _progress(progress: Mapping[str, Any]) -> jobs_pb2.Progress:
    return jobs_pb2.Progress(
        step=int(progress.get("step") or 0),
        steps=int(progress.get("steps") or 0),
        rate=float(progress.get("rate") or 0.0),
        eta_seconds=float(progress.get("eta_s") or 0.0),
        metrics=_numbers(progress.get("metrics") or {}),
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`; nested tables become dotted names."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers.update({f"{key}.{inner}": number for inner, number in _numbers(value).items()})
        elif isinstance(value, int | float):
            numbers[str(key)] = float(value)
    return numbers


def _time(seconds: float | None) -> Timestamp | None:
    if seconds is None or not math.isfinite(seconds):
        return None
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def notice_message(notice: watch.Notice) -> jobs_pb2.WatchResponse:
    """One message of a Watch stream."""
    response = jobs_pb2.WatchResponse(job_id=notice.job_id, cursor=_cursor(notice.cursor))
    value = notice.value
    if isinstance(value, Event):
        response.change.CopyFrom(_change(value))
    elif isinstance(value, watch.SampleNotice):
        response.sample.CopyFrom(jobs_pb2.Sample(step=value.step, name=value.name, data=value.data))
    elif isinstance(value, Record):
        response.job.CopyFrom(job_message(value))
    elif isinstance(value, str):
        response.log = value
    elif notice.what == "metrics":
        response.metrics.CopyFrom(_metrics(value))
    else:
        response.progress.CopyFrom(_progress(value))
    return response


def _cursor(cursor: watch.Cursor) -> jobs_pb2.WatchCursor:
    return jobs_pb2.WatchCursor(
        event=cursor.event,
        metrics_offset=cursor.metrics_offset,
        log_offset=cursor.log_offset,
        sample=cursor.sample,
    )


def _change(event: Event) -> jobs_pb2.StateChange:
    return jobs_pb2.StateChange(
        what=event.what,
        state=state_value(event.state),
        attempt=event.attempt,
        message=event.message,
        who=event.who,
        time=_time(event.time),
    )


def _metrics(line: Mapping[str, Any]) -> jobs_pb2.Metrics:
    numbers = _numbers({key: value for key, value in line.items() if key not in ("step", "time")})
    time = line.get("time")
    return jobs_pb2.Metrics(
        step=int(line.get("step") or 0),
        values=numbers,
        time=_time(float(time)) if isinstance(time, int | float) else None,
    )


def plan_message(plan: Mapping[str, Any]) -> jobs_pb2.Plan:
    """Plan of one job that a dry run made."""
    return jobs_pb2.Plan(
        name=str(plan["name"]),
        kind=f"JOB_KIND_{str(plan['kind']).upper()}",
        memory_bytes=int(plan.get("memory_bytes", 0)),
        standing_bytes=int(plan.get("standing_bytes", 0)),
        device=str(plan.get("device", "")),
        device_bytes=int(plan.get("device_bytes", 0)),
        fits=bool(plan.get("fits", True)),
        note=str(plan.get("note", "")),
    )


def queue_message(queue: QueueState) -> jobs_pb2.Queue:
    """A queue's state."""
    return jobs_pb2.Queue(
        name=queue.name,
        queued=queue.queued,
        running=queue.running,
        paused=queue.paused,
        reason=queue.reason,
        who=queue.who,
        since_time=_time(queue.since),
    )


def garbage_rules(request: jobs_pb2.CollectGarbageRequest) -> Rules:
    """Rules of a CollectGarbage request: what stays."""
    return Rules(
        request.keep if request.HasField("keep") else DEFAULT_KEEP,
        request.older_than_seconds if request.HasField("older_than_seconds") else DEFAULT_OLDER_THAN_S,
    )


def garbage_message(collected: Collected) -> jobs_pb2.CollectGarbageResponse:
    """Garbage that was removed, or would be."""
    garbage = [
        jobs_pb2.Garbage(
            kind=f"KIND_{thing.kind.upper()}",
            name=thing.name,
            bytes=thing.size,
            age_seconds=thing.age_s,
        )
        for thing in collected.garbage
    ]
    kept = [jobs_pb2.KeptModel(name=name, reason=reason) for name, reason in sorted(collected.kept.items())]
    return jobs_pb2.CollectGarbageResponse(garbage=garbage, bytes=sum(g.bytes for g in garbage), kept=kept)

"""Jobs and what a Watch tells of them, as the values that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillery.v1.jobs_pb2 import Job, WatchResponse


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

    values: dict[str, Any] = _with_numbers(MessageToDict(message, preserving_proto_field_name=True))
    return values


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

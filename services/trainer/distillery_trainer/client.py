"""A client of the Jobs API.

with JobsClient("127.0.0.1:50051") as jobs:
job = jobs.submit(train_spec("dmd2", {"steps": 500}))
for news in jobs.watch(job.id):
...
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc
import tomli_w
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from distill_core.errors import DistilleryError, NotFound, Unavailable
from distill_service.channels import channel
from distill_service.settings import settings
from distill_service.status import error_from_call
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery.v1.jobs_pb2 import ConvertSpec, EvaluateSpec, Job, PipelineSpec, StageSpec, TrainSpec

Work: TypeAlias = TrainSpec | ConvertSpec | EvaluateSpec | PipelineSpec
ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)
_FIELDS = {TrainSpec: "train", ConvertSpec: "convert", EvaluateSpec: "evaluate", PipelineSpec: "pipeline"}
_RECONNECT_S = 30.0


def train_spec(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TrainSpec:
    """A training run: a recipe's name, a .toml file on this machine, or its values; with dotted overrides.

    Raises:
        NotFound: the file does not exist.
    """
    changes = {key: _toml_value(value) for key, value in (overrides or {}).items()}
    if isinstance(recipe, Mapping):
        return TrainSpec(recipe_toml=tomli_w.dumps(recipe), overrides=changes)
    if Path(recipe).suffix != ".toml":
        return TrainSpec(recipe_name=str(recipe), overrides=changes)
    try:
        text = Path(recipe).read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"recipe file {recipe} cannot be read: {error.strerror}", field="recipe") from None
    return TrainSpec(recipe_toml=text, overrides=changes)


def _toml_value(value: Any) -> str:
    """A value as TOML writes it after `key =`; tables too, which are written inline inside an array only."""
    nested = tomli_w.dumps({"v": [[value]]}, multiline_strings=False)
    return nested.removeprefix("v = [\n    [\n").removesuffix(",\n    ],\n]\n").strip()


def convert_spec(artifact: str, target: str, tolerance: float | None = None) -> ConvertSpec:
    """A conversion."""
    return ConvertSpec(artifact=artifact, target=target, tolerance=tolerance)


def evaluate_spec(
    artifact: str, evaluate: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None
) -> EvaluateSpec:
    """An evaluation; the tables are as in a recipe."""
    tables = {"evaluate": evaluate, "data": data}
    structs = {name: ParseDict(dict(table), Struct()) for name, table in tables.items() if table is not None}
    return EvaluateSpec(artifact=artifact, **structs)


def stage(name: str, work: TrainSpec | ConvertSpec | EvaluateSpec, *, after: Iterable[str] = ()) -> StageSpec:
    """A stage of a pipeline; others refer to what it publishes as `{name}`."""
    return StageSpec(name=name, after=after, **{_FIELDS[type(work)]: work})


def pipeline_spec(*stages: StageSpec) -> PipelineSpec:
    """Stages that feed each other, in an order in which each refers to earlier ones only."""
    return PipelineSpec(stages=stages)


class JobsClient:
    """Calls the Jobs API; errors come as the `DistilleryError` that the server raised."""

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        ca: Path | str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """`address`, `token` and `ca` default to this machine's settings, as does the client's own certificate."""
        values = settings()
        tls = values.client_tls() if ca is None else {**values.client_tls(), "ca": ca}
        self.address = address or f"{values.jobs_host}:{values.jobs_port}"
        self._channel = channel(self.address, token=token or values.client_token(), **tls)
        self._stub = jobs_pb2_grpc.JobsServiceStub(self._channel)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def submit(
        self,
        work: Work,
        *,
        name: str = "",
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str = "",
    ) -> Job:
        """Queue a job; sent again after a lost connection, it is still queued once."""
        request = jobs_pb2.SubmitRequest(
            name=name,
            priority=priority,
            labels=labels,
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            **{_FIELDS[type(work)]: work},
        )
        with self._errors():
            return self._stub.Submit(request, timeout=self._timeout_s).job

    def get(self, job_id: str) -> Job:
        """A job."""
        with self._errors():
            return self._stub.Get(jobs_pb2.GetRequest(id=job_id), timeout=self._timeout_s).job

    def list(
        self,
        *,
        states: Iterable[jobs_pb2.JobState] = (),
        kinds: Iterable[jobs_pb2.JobKind] = (),
        limit: int = 50,
    ) -> list[Job]:
        """The newest `limit` jobs of these states and kinds."""
        request = jobs_pb2.ListRequest(states=states, kinds=kinds)
        jobs: list[Job] = []
        while len(jobs) < limit:
            request.page_size = min(limit - len(jobs), 500)
            with self._errors():
                page = self._stub.List(request, timeout=self._timeout_s)
            jobs += page.jobs
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return jobs

    def watch(
        self,
        job_id: str,
        *,
        cursors: Mapping[str, jobs_pb2.WatchCursor] | None = None,
        with_samples: bool = False,
        with_log: bool = False,
        only_new: bool = False,
    ) -> Iterator[jobs_pb2.WatchResponse]:
        """All that happens to a job until it ends. A lost connection is taken up again where it broke."""
        request = jobs_pb2.WatchRequest(
            id=job_id, cursors=cursors, with_samples=with_samples, with_log=with_log, only_new=only_new
        )
        lost_at: float | None = None
        while True:
            try:
                with self._errors():
                    for response in self._stub.Watch(request):
                        request.cursors[response.job_id].CopyFrom(response.cursor)
                        lost_at = None
                        yield response
                return
            except Unavailable:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _RECONNECT_S or not request.cursors:
                    raise
                time.sleep(0.5)

    def wait(self, job_id: str) -> Job:
        """The job once it has ended."""
        for response in self.watch(job_id, only_new=True):
            if response.WhichOneof("event") == "job" and response.job.state in ENDED:
                return response.job
        return self.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Stop a job; its checkpoint is kept."""
        with self._errors():
            return self._stub.Cancel(jobs_pb2.CancelRequest(id=job_id), timeout=self._timeout_s).job

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again; it continues."""
        with self._errors():
            return self._stub.Retry(jobs_pb2.RetryRequest(id=job_id), timeout=self._timeout_s).job

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            translated: DistilleryError = error_from_call(error, self.address)
            raise translated from None

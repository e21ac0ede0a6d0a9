"""A client of the Jobs API.

with JobsClient("127.0.0.1:50051") as jobs:
job = jobs.submit(train_spec("dmd2", {"steps": 500}))
for news in jobs.watch(job.id):
...
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc
import tomli_w
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from distill_core.errors import ConfigError, DistilleryError, NotFound, Unavailable
from distill_core.recipe import load_recipe, parse_overrides, recipe_names
from distill_core.recipe.suggestions import no_such_recipe
from distill_service.channels import channel
from distill_service.jobs.paths import absolute, absolute_value
from distill_service.settings import settings
from distill_service.status import error_from_call
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery.v1.jobs_pb2 import (
    ConvertSpec,
    EvaluateSpec,
    Job,
    PipelineSpec,
    Plan,
    Queue,
    StageSpec,
    SweepAxis,
    SweepSpec,
    TrainSpec,
)

Work: TypeAlias = TrainSpec | ConvertSpec | EvaluateSpec | PipelineSpec | SweepSpec
ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)
_FIELDS = {
    TrainSpec: "train",
    ConvertSpec: "convert",
    EvaluateSpec: "evaluate",
    PipelineSpec: "pipeline",
    SweepSpec: "sweep",
}
_RECONNECT_S = 30.0
_LONG_S = 600.0  # a dry run loads a model library, a collection reads the whole store


def train_spec(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TrainSpec:
    """A training run: a recipe's name, a .toml file on this machine, or its values; with dotted overrides.

    Paths in it are read from this process's folder, as `distillery train` reads them.

    Raises:
        NotFound: the file does not exist.
    """
    placed = _placed(recipe, {key: absolute_value(key, value) for key, value in (overrides or {}).items()})
    changes = {key: _toml_value(value) for key, value in placed.items()}
    if isinstance(recipe, Mapping):
        return TrainSpec(recipe_toml=tomli_w.dumps(recipe), overrides=changes)
    if Path(recipe).suffix != ".toml":
        is_file = Path(recipe).suffix or Path(recipe).exists()
        if is_file and str(recipe) not in recipe_names():
            raise no_such_recipe(str(recipe), recipe_names())
        return TrainSpec(recipe_name=str(recipe), overrides=changes)
    if not Path(recipe).exists():
        raise no_such_recipe(str(recipe), recipe_names())
    try:
        text = Path(recipe).read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"recipe file {recipe} cannot be read: {error.strerror}", field="recipe") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"recipe {recipe} is not a text file; a recipe is TOML in UTF-8", field="recipe"
        ) from None
    return TrainSpec(recipe_toml=text, overrides=changes)


def _placed(recipe: str | Path | Mapping[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, and those that make the recipe's own relative paths absolute."""
    try:
        source = recipe if isinstance(recipe, Mapping) else str(recipe)
        before = load_recipe(source, overrides)
        after = load_recipe(absolute(before.model_dump(mode="json", exclude_none=True)))
    except DistilleryError:  # the server, which may know more recipes, answers what is wrong
        return overrides
    return overrides | {key: placed for key, (_, placed) in after.differences(before).items()}


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
    structs = {
        name: ParseDict(absolute(table), Struct()) for name, table in tables.items() if table is not None
    }
    return EvaluateSpec(artifact=artifact, **structs)


def stage(name: str, work: TrainSpec | ConvertSpec | EvaluateSpec, *, after: Iterable[str] = ()) -> StageSpec:
    """A stage of a pipeline; others refer to what it publishes as `{name}`."""
    return StageSpec(name=name, after=after, **_as_field(work))


def _as_field(work: Work) -> dict[str, Any]:
    return {_FIELDS[type(work)]: work}


def pipeline_spec(*stages: StageSpec) -> PipelineSpec:
    """Stages that feed each other, in an order in which each refers to earlier ones only."""
    return PipelineSpec(stages=stages)


def sweep_spec(train: TrainSpec, axes: Mapping[str, Iterable[str]]) -> SweepSpec:
    """A training run for each combination of the keys' values, which are TOML."""
    placed = {key: [_placed_value(key, value) for value in values] for key, values in axes.items()}
    return SweepSpec(train=train, axes=[SweepAxis(key=key, values=values) for key, values in placed.items()])


def _placed_value(key: str, text: str) -> str:
    """A sweep's value, TOML or a bare text; a path made absolute."""
    value = parse_overrides([f"{key}={text}"])[key.strip()]
    placed = absolute_value(key, value)
    return text if placed == value else _toml_value(placed)


def request(
    work: Work,
    *,
    name: str = "",
    priority: int = 0,
    labels: Mapping[str, str] | None = None,
    idempotency_key: str = "",
) -> jobs_pb2.SubmitRequest:
    """The request that queues `work`; without a key of the caller's it gets one of its own."""
    return jobs_pb2.SubmitRequest(
        name=name,
        priority=priority,
        labels=labels,
        idempotency_key=idempotency_key or uuid.uuid4().hex,
        **_as_field(work),
    )


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
        tls = values.client_tls()
        if ca is not None:
            tls["ca"] = ca
        self.address = address or values.jobs_address
        self._channel = channel(self.address, token=token or values.client_token(), **tls)
        self._stub = jobs_pb2_grpc.JobsServiceStub(self._channel)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def submit(self, work: Work, **options: Any) -> Job:
        """Queue a job; sent again after a lost connection, it is still queued once. Options as in `request`."""
        return self._submit(request(work, **options)).job

    def sweep(self, work: SweepSpec, **options: Any) -> list[Job]:
        """Queue a sweep; its jobs have the label `sweep`, the first one's id."""
        return list(self._submit(request(work, **options)).jobs)

    def dry_run(self, work: Work, **options: Any) -> list[Plan]:
        """Plans of what would be queued, and what each job would need; nothing is."""
        asked = request(work, **options)
        asked.dry_run = True
        return list(self._submit(asked, timeout_s=_LONG_S).plans)

    def _submit(
        self, asked: jobs_pb2.SubmitRequest, timeout_s: float | None = None
    ) -> jobs_pb2.SubmitResponse:
        with self._errors():
            response: jobs_pb2.SubmitResponse = self._stub.Submit(asked, timeout=timeout_s or self._timeout_s)
            return response

    def get(self, job_id: str) -> Job:
        """A job."""
        with self._errors():
            job: Job = self._stub.Get(jobs_pb2.GetRequest(id=job_id), timeout=self._timeout_s).job
            return job

    def list(self, *, limit: int = 50, **filters: Any) -> list[Job]:
        """The newest `limit` jobs; filters as in `pages`."""
        jobs: list[Job] = []
        for page in self.pages(page_size=min(limit, 500), **filters):
            jobs += page
            if len(jobs) >= limit:
                break
        return jobs[:limit]

    def pages(
        self,
        *,
        states: Iterable[jobs_pb2.JobState] = (),
        kinds: Iterable[jobs_pb2.JobKind] = (),
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 500,
    ) -> Iterator[Sequence[Job]]:
        """Jobs of these states, kinds, labels and times, newest first."""
        request = jobs_pb2.ListRequest(
            states=states,
            kinds=kinds,
            labels=labels,
            created_after=created_after,
            created_before=created_before,
            page_size=page_size,
        )
        while True:
            with self._errors():
                page = self._stub.List(request, timeout=self._timeout_s)
            yield page.jobs
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

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
            job: Job = self._stub.Cancel(jobs_pb2.CancelRequest(id=job_id), timeout=self._timeout_s).job
            return job

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again; it continues."""
        with self._errors():
            job: Job = self._stub.Retry(jobs_pb2.RetryRequest(id=job_id), timeout=self._timeout_s).job
            return job

    def queues(self) -> Sequence[Queue]:
        """All queues, by name."""
        with self._errors():
            queues: Sequence[Queue] = self._stub.ListQueues(
                jobs_pb2.ListQueuesRequest(), timeout=self._timeout_s
            ).queues
            return queues

    def pause(self, queue: str, reason: str = "") -> Queue:
        """Start no job of a queue until it is resumed."""
        with self._errors():
            request = jobs_pb2.PauseQueueRequest(name=queue, reason=reason)
            paused: Queue = self._stub.PauseQueue(request, timeout=self._timeout_s).queue
            return paused

    def resume(self, queue: str) -> Queue:
        """Let a paused queue go on."""
        with self._errors():
            request = jobs_pb2.ResumeQueueRequest(name=queue)
            resumed: Queue = self._stub.ResumeQueue(request, timeout=self._timeout_s).queue
            return resumed

    def collect_garbage(
        self, *, keep: int = 3, older_than_s: float = 30 * 86_400.0, dry_run: bool = True
    ) -> jobs_pb2.CollectGarbageResponse:
        """Remove run folders and models that nothing needs, or only say which."""
        request = jobs_pb2.CollectGarbageRequest(keep=keep, older_than_seconds=older_than_s, dry_run=dry_run)
        with self._errors():
            response: jobs_pb2.CollectGarbageResponse = self._stub.CollectGarbage(request, timeout=_LONG_S)
            return response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            translated: DistilleryError = error_from_call(error, self.address)
            raise translated from None

"""distillery.v1.JobsService: message, call, message. The work is done in `distill_service.jobs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from celery import Celery

from distill_core.artifacts import ArtifactStore
from distill_core.errors import Overloaded
from distill_service.auth import CALLER
from distill_service.jobs import garbage, pauses, requests
from distill_service.jobs.celery_app import wake
from distill_service.jobs.conversions import check_conversions
from distill_service.jobs.database import Database
from distill_service.jobs.dry_run import DryRuns
from distill_service.jobs.hub import Hub
from distill_service.jobs.listing import list_jobs
from distill_service.jobs.paths import check_paths
from distill_service.settings import Settings
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery_trainer import messages


class JobsServicer(jobs_pb2_grpc.JobsServiceServicer):
    """Answers from the job table and the run folders; database calls run in threads."""

    def __init__(self, db: Database, app: Celery, settings: Settings) -> None:
        self._db, self._app, self._settings = db, app, settings
        self._hub = Hub(db, settings.runs)
        self._dry_runs = DryRuns(settings)
        self._rings: set[asyncio.Task[bool]] = set()
        self._collecting = asyncio.Lock()

    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.SubmitResponse:
        options = requests.Options(
            name=request.name,
            priority=request.priority,
            labels=dict(request.labels),
            idempotency_key=request.idempotency_key,
            max_attempts=self._settings.max_attempts,
            who=CALLER.get().name,
        )
        drafts = await asyncio.to_thread(messages.drafts, request)
        for draft in drafts:
            check_paths(draft.spec, self._settings)
        await asyncio.to_thread(check_conversions, drafts, self._settings)
        which = request.WhichOneof("work")
        shape = {"pipeline": which == "pipeline", "sweep": which == "sweep"}
        if request.dry_run:
            requests.check(drafts, options, **shape)
            plans = await self._dry_runs.plans(drafts)
            return jobs_pb2.SubmitResponse(plans=[messages.plan_message(plan) for plan in plans])
        record = await asyncio.to_thread(requests.submit, self._db, drafts, options, **shape)
        self._ring(requests.ready_queues(record))
        swept = await asyncio.to_thread(requests.sweep_of, self._db, record.job) if shape["sweep"] else []
        jobs = [messages.job_message(job) for job in swept]
        return jobs_pb2.SubmitResponse(job=messages.job_message(record), jobs=jobs)

    async def Get(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.GetResponse:
        record = await asyncio.to_thread(requests.get, self._db, request.id)
        return jobs_pb2.GetResponse(job=messages.job_message(record, with_spec=True))

    async def List(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.ListResponse:
        records, token = await asyncio.to_thread(
            list_jobs,
            self._db,
            messages.filters(request),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        jobs = [messages.job_message(record) for record in records]
        return jobs_pb2.ListResponse(jobs=jobs, next_page_token=token)

    async def Watch(
        self, request: jobs_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.WatchResponse]:
        async with aclosing(self._hub.follow(request.id, messages.watch_options(request))) as notices:
            async for notice in notices:
                yield messages.notice_message(notice)

    async def Cancel(self, request: jobs_pb2.CancelRequest, context: Any) -> jobs_pb2.CancelResponse:
        record = await asyncio.to_thread(requests.cancel, self._db, request.id, who=CALLER.get().name)
        return jobs_pb2.CancelResponse(job=messages.job_message(record))

    async def Retry(self, request: jobs_pb2.RetryRequest, context: Any) -> jobs_pb2.RetryResponse:
        record = await asyncio.to_thread(requests.retry, self._db, request.id, who=CALLER.get().name)
        self._ring(requests.ready_queues(record))
        return jobs_pb2.RetryResponse(job=messages.job_message(record))

    async def ListQueues(
        self, request: jobs_pb2.ListQueuesRequest, context: Any
    ) -> jobs_pb2.ListQueuesResponse:
        queues = await asyncio.to_thread(pauses.queue_states, self._db)
        return jobs_pb2.ListQueuesResponse(queues=[messages.queue_message(queue) for queue in queues])

    async def PauseQueue(
        self, request: jobs_pb2.PauseQueueRequest, context: Any
    ) -> jobs_pb2.PauseQueueResponse:
        who = CALLER.get().name
        queue = await asyncio.to_thread(
            pauses.set_paused, self._db, request.name, True, reason=request.reason, who=who
        )
        return jobs_pb2.PauseQueueResponse(queue=messages.queue_message(queue))

    async def ResumeQueue(
        self, request: jobs_pb2.ResumeQueueRequest, context: Any
    ) -> jobs_pb2.ResumeQueueResponse:
        who = CALLER.get().name
        queue = await asyncio.to_thread(pauses.set_paused, self._db, request.name, False, who=who)
        self._ring({queue.name})
        return jobs_pb2.ResumeQueueResponse(queue=messages.queue_message(queue))

    async def CollectGarbage(
        self, request: jobs_pb2.CollectGarbageRequest, context: Any
    ) -> jobs_pb2.CollectGarbageResponse:
        if self._collecting.locked():
            raise Overloaded(
                "garbage is being collected already; try again when that is done", retry_after_s=60
            )
        async with self._collecting:
            collected = await asyncio.to_thread(
                garbage.collect,
                self._db,
                self._settings.runs,
                ArtifactStore(self._settings.store_url),
                messages.garbage_rules(request),
                dry_run=request.dry_run,
            )
        return messages.garbage_message(collected)

    def _ring(self, queues: Iterable[str]) -> None:
        """Wake a worker, without letting the caller wait for a broker that may be down."""
        task = asyncio.create_task(asyncio.to_thread(wake, self._app, queues))
        self._rings.add(task)
        task.add_done_callback(self._rings.discard)

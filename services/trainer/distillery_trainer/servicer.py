"""distillery.v1.JobsService: message, call, message. The work is done in `distill_service.jobs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from celery import Celery

from distill_service.auth import CALLER
from distill_service.jobs import requests
from distill_service.jobs.celery_app import wake
from distill_service.jobs.database import Database
from distill_service.jobs.watch import Watch
from distill_service.settings import Settings
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery_trainer import messages

_LOOK_S = 0.3  # between two looks of a watcher


class JobsServicer(jobs_pb2_grpc.JobsServiceServicer):
    """Answers from the job table and the run folders; database calls run in threads."""

    def __init__(self, db: Database, app: Celery, settings: Settings) -> None:
        self._db, self._app, self._settings = db, app, settings
        self._rings: set[asyncio.Task[bool]] = set()

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
        pipeline = request.WhichOneof("work") == "pipeline"
        record = await asyncio.to_thread(requests.submit, self._db, drafts, options, pipeline=pipeline)
        self._ring(record)
        return jobs_pb2.SubmitResponse(job=messages.job_message(record))

    async def Get(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.GetResponse:
        record = await asyncio.to_thread(requests.get, self._db, request.id)
        return jobs_pb2.GetResponse(job=messages.job_message(record, with_spec=True))

    async def List(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.ListResponse:
        records, token = await asyncio.to_thread(
            requests.list_jobs,
            self._db,
            states=messages.states(list(request.states)),
            kinds=messages.kinds(list(request.kinds)),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        jobs = [messages.job_message(record) for record in records]
        return jobs_pb2.ListResponse(jobs=jobs, next_page_token=token)

    async def Watch(
        self, request: jobs_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.WatchResponse]:
        watch = Watch(self._db, self._settings.runs, request.id, messages.watch_options(request))
        while not watch.ended:
            notices = await asyncio.to_thread(watch.look)
            for notice in notices:
                yield messages.notice_message(notice)
            if not notices:
                await asyncio.sleep(_LOOK_S)

    async def Cancel(self, request: jobs_pb2.CancelRequest, context: Any) -> jobs_pb2.CancelResponse:
        record = await asyncio.to_thread(requests.cancel, self._db, request.id, who=CALLER.get().name)
        return jobs_pb2.CancelResponse(job=messages.job_message(record))

    async def Retry(self, request: jobs_pb2.RetryRequest, context: Any) -> jobs_pb2.RetryResponse:
        record = await asyncio.to_thread(requests.retry, self._db, request.id, who=CALLER.get().name)
        self._ring(record)
        return jobs_pb2.RetryResponse(job=messages.job_message(record))

    def _ring(self, record: requests.Record) -> None:
        """Wake a worker, without letting the caller wait for a broker that may be down."""
        task = asyncio.create_task(asyncio.to_thread(wake, self._app, requests.ready_queues(record)))
        self._rings.add(task)
        task.add_done_callback(self._rings.discard)

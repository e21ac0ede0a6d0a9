"""Prometheus figures of jobs: from the table at scrape time in the Jobs API, from messages in a worker."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from distill_core.errors import Unavailable
from distill_service.jobs.database import Database
from distill_service.jobs.queue import Claim
from distill_service.jobs.table import ENDED, Event, Job, Kind, State

_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)  # s


class JobTableCollector(Collector):
    """Counts of the job table, computed when asked: right after any restart, in any number of servers."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def collect(self) -> Iterator[Metric]:
        """All figures; none while the table cannot be read."""
        try:
            families = [self._jobs(), self._seconds(), self._attempts(), self._expired()]
        except Unavailable:
            families = []
        up = GaugeMetricFamily(
            "distillery_job_table_up", "1: the job table can be read", float(bool(families))
        )
        yield from (up, *families)

    def describe(self) -> list[Metric]:
        return []  # so that registering does not query

    def _jobs(self) -> Metric:
        family = GaugeMetricFamily("distillery_jobs", "Jobs by kind and state", labels=["kind", "state"])
        counts = {(str(kind), str(state)): 0 for kind in Kind for state in State}
        query = select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state)
        with self._db.read() as session:
            for kind, state, count in session.execute(query):
                counts[kind, state] = count
        for labels, count in counts.items():
            family.add_metric(labels, count)
        return family

    def _seconds(self) -> Metric:
        family = HistogramMetricFamily(
            "distillery_job_seconds", "Duration of the last attempt of ended jobs", labels=["kind", "result"]
        )
        seconds = Job.finished - Job.started
        below = [func.sum((seconds <= bound).cast(Job.attempt.type)) for bound in _BUCKETS]
        query = select(Job.kind, Job.state, func.count(), func.sum(seconds), *below)
        query = query.where(Job.state.in_(ENDED), Job.started.is_not(None)).group_by(Job.kind, Job.state)
        with self._db.read() as session:
            found = {(kind, state): figures for kind, state, *figures in session.execute(query)}
        none = (0, 0.0, *(0 for _ in _BUCKETS))  # so that the first failure is an increase too
        for kind, state in itertools.product(map(str, Kind), map(str, ENDED)):
            count, total, *within = found.get((kind, state), none)
            buckets = [(str(float(bound)), float(n)) for bound, n in zip(_BUCKETS, within, strict=True)]
            family.add_metric([kind, state], [*buckets, ("+Inf", float(count))], sum_value=total)
        return family

    def _attempts(self) -> Metric:
        family = CounterMetricFamily(
            "distillery_job_attempts", "Attempts by how they began or ended", labels=["reason"]
        )
        query = select(Event.what, func.count()).where(Event.attempt > 0).group_by(Event.what)
        with self._db.read() as session:
            for what, count in session.execute(query):
                family.add_metric([what], count)
        return family

    def _expired(self) -> Metric:
        query = select(func.count()).select_from(Event).where(Event.what == "lease_expired")
        with self._db.read() as session:
            count = session.scalar(query) or 0
        return CounterMetricFamily("distillery_lease_expired", "Leases that ran out", value=count)


class WorkerMetrics:
    """Figures of a worker's current job. Labels never hold a job's id: their number must stay small."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._busy = Gauge("distillery_worker_busy", "1 while a job runs", registry=self.registry)
        self._step = Gauge("distillery_train_step", "Step of the current job", registry=self.registry)
        self._rate = Gauge("distillery_train_steps_per_second", "Its rate", registry=self.registry)
        self._images = Gauge(
            "distillery_images_per_second", "Images, or rays of a scene, it trains on", registry=self.registry
        )
        self._memory = Gauge(
            "distillery_gpu_memory_bytes", "The most it held of its GPU", registry=self.registry
        )
        self._loss = Gauge("distillery_train_loss", "Its last figures", ["term"], registry=self.registry)
        self._parity = Gauge(
            "distillery_export_parity_rel_l2",
            "Difference of the last export from PyTorch",
            ["target"],
            registry=self.registry,
        )
        self._seconds = Counter(
            "distillery_worker_busy_seconds", "Time spent on jobs", ["kind"], registry=self.registry
        )

    @contextmanager
    def running(self, claim: Claim) -> Iterator[None]:
        """Around a job."""
        started = time.monotonic()
        self._busy.set(1)
        self._loss.clear()
        try:
            yield
        finally:
            for gauge in (self._busy, self._rate, self._images, self._memory):
                gauge.set(0)
            self._seconds.labels(claim.kind).inc(time.monotonic() - started)

    def observe(self, claim: Claim, message: Mapping[str, Any]) -> None:
        """Take one message of the job's process."""
        if message["event"] == "progress":
            self._step.set(_number(message.get("step")))
            self._rate.set(_number(message.get("rate")))
            self._images.set(_number(message.get("images_per_second", 0)))
            self._memory.set(_number(message.get("gpu_memory_bytes", 0)))
        elif message["event"] == "metrics":
            for term, value in list((message.get("values") or {}).items())[:64]:
                self._loss.labels(str(term)[:64]).set(_number(value))
        elif message["event"] == "result" and claim.kind == "convert":
            difference = (message.get("metrics") or {}).get("rel_l2")
            if difference is not None:
                self._parity.labels(str(claim.spec.get("target", ""))[:64]).set(_number(difference))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")

"""Whole worker processes, over the embedded Redis and over a folder of messages."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_service.jobs import requests
from distill_service.jobs.broker import broker_url, redis_server, running_broker, socket_path
from distill_service.jobs.celery_app import make_app, wake
from distill_service.jobs.database import Database
from distill_service.jobs.guard import guarded
from distill_service.jobs.table import State
from distill_service.settings import load_settings
from tests.services.jobs.jobs_stack import (
    Processes,
    alive,
    child_pids,
    convert,
    ended,
    free_port,
    history,
    processes,
    short_settings,
    step_of,
    submit,
    train,
    wait_for,
)

LONG = {"steps": 4000, "config": {"step_s": 0.02}}


@pytest.fixture(params=["redis", "filesystem"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Processes]:
    if request.param == "redis" and redis_server() is None:
        pytest.skip("no redis-server program here")
    url = "" if request.param == "redis" else f"filesystem://{tmp_path / 'broker'}"
    values = short_settings(tmp_path / "state", broker_url=url)
    with processes(values) as started, running_broker(values):
        yield started


@pytest.fixture
def db(running: Processes) -> Iterator[Database]:
    database = Database.open(running.settings.database_url)
    yield database
    database.close()


def ring(running: Processes, *queues: str) -> bool:
    return wake(make_app(broker_url(running.settings)), queues)


def test_every_process_may_be_killed_and_the_jobs_still_end_once(running, db):
    """One story, as starting costs seconds: doubled messages, a killed job, a killed worker, a cancel."""
    values = running.settings
    worker = running.worker()
    quick = submit(db, train("student", steps=3), convert("{student}", "onnx"), pipeline=True)
    for _ in range(5):
        assert ring(running, "train")
    assert ended(db, quick.job.id).state == State.SUCCEEDED
    student, onnx = (stage.id for stage in requests.get(db, quick.job.id).stages)
    assert len(child_pids(values, student)) == len(child_pids(values, onnx)) == 1
    assert (values.runs / onnx / "converted").read_text() == "digits@1"

    job = submit(db, train(**LONG)).job.id
    ring(running, "train")
    wait_for(lambda: step_of(values, job) >= 2, "two steps")
    os.kill(child_pids(values, job)[-1], signal.SIGKILL)
    wait_for(lambda: len(child_pids(values, job)) == 2, "a second attempt")
    wait_for(lambda: int((values.runs / job / "started_at").read_text()) >= 2, "it to resume")

    worker.kill()
    worker.wait()
    wait_for(lambda: not alive(child_pids(values, job)[-1]), "the job's process to die with its worker")
    running.worker()
    wait_for(lambda: len(child_pids(values, job)) == 3, "a third attempt on the next worker")
    reached = wait_for(lambda: step_of(values, job) if step_of(values, job) > 3 else 0, "more steps")
    assert history(db, job).count("lease_expired") == 1

    requests.cancel(db, job)
    row = ended(db, job)
    assert (row.state, row.attempt, row.crashes) == (State.CANCELLED, 3, 2)
    assert step_of(values, job) >= reached
    assert sum(alive(pid) for pid in child_pids(values, job)) == 0


def test_a_stopped_worker_gives_its_job_to_the_next(running, db):
    values = running.settings
    worker = running.worker("train")
    job = submit(db, train(**LONG)).job.id
    wait_for(lambda: step_of(values, job) >= 1, "a step")
    worker.terminate()
    assert worker.wait() == 0
    row = requests.get(db, job).job
    assert (row.state, row.crashes) == (State.QUEUED, 0)
    assert not alive(child_pids(values, job)[-1])


def test_a_job_submitted_while_redis_is_gone_is_found_by_looking(tmp_path):
    if redis_server() is None:
        pytest.skip("no redis-server program here")
    port = free_port()
    values = short_settings(tmp_path / "state", broker_url=f"redis://127.0.0.1:{port}/0")
    with processes(values) as started:
        server = subprocess.Popen(
            guarded(redis_server(), "--port", str(port), "--save", ""), stdout=subprocess.DEVNULL
        )
        database = Database.open(values.database_url)
        worker = started.worker("train")
        first = submit(database, train()).job.id
        assert ended(database, first).state == State.SUCCEEDED
        server.kill()  # nobody starts this one again
        server.wait()
        second = submit(database, train()).job.id
        assert not wake(make_app(broker_url(values)), ["train"])
        assert ended(database, second).state == State.SUCCEEDED
        worker.terminate()
        assert worker.wait() == 0
        database.close()


def test_two_services_share_one_embedded_redis(tmp_path):
    if redis_server() is None:
        pytest.skip("no redis-server program here")
    values = short_settings(tmp_path / ("long" * 40))
    with running_broker(values) as first, running_broker(values) as second:
        assert first == second
        assert len(str(socket_path(values.state_dir))) < 108
        assert wake(make_app(first), ["train"])
    assert not wake(make_app(first), ["train"])


def test_without_a_redis_program_messages_go_through_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_service.jobs.broker.redis_server", lambda: None)
    values = short_settings(tmp_path)
    with running_broker(values) as url:
        assert url == f"filesystem://{tmp_path / 'broker'}"
        assert wake(make_app(url), ["train"])
    assert list((tmp_path / "broker" / "messages").iterdir())


def test_a_configured_broker_is_used_as_it_is():
    assert broker_url(load_settings(broker_url="redis://queue:6379/0")) == "redis://queue:6379/0"

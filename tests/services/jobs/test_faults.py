"""What single faults do to the job machinery. All of them at random, together: `make chaos`, tests/chaos."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from distill_service.jobs import queue, requests, supervisor
from distill_service.jobs.broker import redis_server, running_broker
from distill_service.jobs.celery_app import make_app, wake
from distill_service.jobs.child import Child, log_tail
from distill_service.jobs.database import Database
from distill_service.jobs.supervisor import Supervisor, retry_delay
from distill_service.jobs.table import State
from distill_service.settings import Settings
from tests.services.jobs.jobs_stack import (
    COMMANDS,
    HERE,
    alive,
    child_pids,
    ended,
    history,
    processes,
    redis_pid,
    short_settings,
    step_of,
    submit,
    train,
    wait_for,
)

LONG = {"steps": 4000, "config": {"step_s": 0.02}}
DAY_S = 86_400.0
needs_redis = pytest.mark.skipif(redis_server() is None, reason="no redis-server program here")


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    return short_settings(tmp_path / "state")


@pytest.fixture
def supervised(db: Database, values: Settings) -> Supervisor:
    return Supervisor(db, values, worker="tester", commands=COMMANDS)


@pytest.fixture
def running(db: Database, values: Settings, supervised: Supervisor) -> Iterator[tuple[str, threading.Thread]]:
    """A long job and the thread that supervises it."""
    job = submit(db, train(**LONG)).job.id
    claim = queue.claim(db, ["train"], worker="tester", lease_s=values.lease_s)
    thread = threading.Thread(target=supervised.run, args=(claim,))
    thread.start()
    wait_for(lambda: step_of(values, job) >= 1, "a step")
    yield job, thread
    supervised.stop()
    thread.join()


def talker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Path:
    (tmp_path / "talker.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    spec = tmp_path / "run" / "spec.json"
    spec.parent.mkdir()
    spec.write_text("{}")
    return spec


def test_a_process_that_could_not_be_started_keeps_no_lock_on_the_run_folder(tmp_path, monkeypatch):
    spec = talker(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(IsADirectoryError):
        Child("talker", spec, log=tmp_path)
    Child("talker", spec, log=tmp_path / "log.txt").end()


def test_the_run_folder_names_its_holder_and_nobody_who_held_it_before(tmp_path, monkeypatch):
    """An attempt whose worker died before it could sign must not be taken for an earlier attempt's process."""
    spec = talker(tmp_path, monkeypatch, "import time; time.sleep(60)")
    lock = spec.parent / ".lock"
    lock.write_text("4194303@elsewhere")
    with pytest.raises(IsADirectoryError):
        Child("talker", spec, log=tmp_path)
    assert lock.read_text().strip() == ""


def test_a_log_that_cannot_be_written_ends_no_job(tmp_path, monkeypatch):
    spec = talker(tmp_path, monkeypatch, 'print(\'no message\'); print(\'{"event": "progress", "step": 1}\')')
    log = tmp_path / "log.txt"
    child = Child("talker", spec, log=log)
    log.unlink()
    log.mkdir()  # as a full disk, it refuses every line
    found = []
    while not child.exited():
        found += child.events(0.1)
    assert [*found, *child.events(0.0)] == [{"event": "progress", "step": 1}]
    assert log_tail(log) == ""


def test_the_wait_before_another_attempt_grows_and_ends_at_five_minutes():
    assert [retry_delay(crashes, 5.0) for crashes in (0, 1, 2, 100)] == [5.0, 10.0, 20.0, queue.MAX_DELAY_S]


def test_a_job_that_is_stopped_together_with_its_worker_does_not_count(
    db, values, supervised, running, monkeypatch
):
    """Who stops a unit tells all of its processes at once, and the job's may end before its worker has heard."""
    monkeypatch.setattr(supervisor, "_STOP_TOGETHER_S", 60.0)
    job, thread = running
    pid = child_pids(values, job)[-1]
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid), "the job's process to end")
    supervised.stop()
    thread.join()
    row = requests.get(db, job).job
    assert (row.state, row.crashes, history(db, job)[-1]) == (State.QUEUED, 0, "preempted")


def test_a_job_ends_with_its_lease_even_while_the_database_hangs(db, values, running):
    """Another worker may run it from then on, so this one must not, whatever call it is waiting in."""
    job, _ = running
    pid = child_pids(values, job)[-1]
    holder = sqlite3.connect(db.engine.url.database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")  # every heartbeat now waits for half a minute
    try:
        wait_for(lambda: not alive(pid), "the job's process to end with its lease")
    finally:
        holder.execute("ROLLBACK")
        holder.close()


def test_a_clock_that_is_set_back_delays_nothing_for_long(db):
    """Times that nobody can have set on today's clock count as past: a lease, a delay, a duty."""
    delayed, held = submit(db, train()).job.id, submit(db, train()).job.id
    with db.write() as session:
        session.execute(text("UPDATE jobs SET not_before = not_before + :day"), {"day": DAY_S})
    assert queue.claim(db, ["train"], worker="a", lease_s=30).id == delayed
    assert queue.claim(db, ["train"], worker="a", lease_s=30).id == held
    assert queue.reap(db, longest_lease_s=300) == []
    with db.write() as session:
        session.execute(text("UPDATE jobs SET lease_until = lease_until + :day"), {"day": DAY_S})
    assert queue.reap(db, longest_lease_s=300) == [delayed, held]
    assert queue.lead(db, "reaper", holder="a", for_s=10)
    assert not queue.lead(db, "reaper", holder="b", for_s=10)
    with db.write() as session:
        session.execute(text("UPDATE job_leaders SET until = until + :day"), {"day": DAY_S})
    assert queue.lead(db, "reaper", holder="b", for_s=10)


@needs_redis
def test_a_redis_that_stands_still_holds_up_nobody(tmp_path):
    values = short_settings(tmp_path / "state")
    with running_broker(values) as url:
        app = make_app(url)
        assert wake(app, ["train"])
        os.kill(redis_pid(values), signal.SIGSTOP)
        try:
            assert not wake(app, ["train"])
        finally:
            os.kill(redis_pid(values), signal.SIGCONT)
        assert wait_for(lambda: wake(app, ["train"]), "Redis to answer again")


@needs_redis
def test_an_embedded_redis_that_dies_is_started_again(tmp_path):
    values = short_settings(tmp_path / "state")
    with running_broker(values) as url:
        first = redis_pid(values)
        os.kill(first, signal.SIGKILL)
        app = make_app(url)
        wait_for(lambda: wake(app, ["train"]), "the next Redis to answer")
        second = redis_pid(values)
        assert second != first
    assert not alive(second)


@pytest.mark.parametrize("left", ["", '[["tra'])
def test_a_broker_folder_that_was_damaged_is_mended(left, tmp_path):
    """A full disk or a kill cuts off the lists in which kombu keeps its queues; a worker could not start then."""
    ring = (
        "import sys; from distill_service.jobs.celery_app import make_app, wake\n"
        "assert wake(make_app(sys.argv[1]), ['train'])"
    )
    url = f"filesystem://{tmp_path / 'broker'}"
    subprocess.run([sys.executable, "-c", ring, url], check=True)
    (control,) = (tmp_path / "broker" / "control").iterdir()
    control.write_text(left)
    subprocess.run([sys.executable, "-c", ring, url], check=True)
    assert json.loads(control.read_text()) == [["train", "", "train"]]


def test_a_broker_folder_that_cannot_be_written_is_said_and_no_more(tmp_path):
    app = make_app(f"filesystem://{tmp_path / 'broker'}")
    messages = tmp_path / "broker" / "messages"
    messages.rmdir()
    messages.write_text("a file where the folder should be")
    assert not wake(app, ["train"])


def test_a_message_that_was_cut_off_stops_no_worker(tmp_path):
    values = short_settings(tmp_path / "state", broker_url=f"filesystem://{tmp_path / 'broker'}")
    with processes(values) as started:
        database = Database.open(values.database_url)
        worker = started.worker("train")
        assert ended(database, submit(database, train()).job.id).state == State.SUCCEEDED
        broken = tmp_path / "broker" / "messages" / "0_broken.train.msg"
        broken.write_bytes(b'{"body": "W1')
        wait_for(lambda: not broken.exists(), "the message to be taken")
        wait_for(lambda: "begin again" in started.log(), "the worker to listen again")
        wake(make_app(values.broker_url), ["train"])
        wait_for(lambda: not list((tmp_path / "broker" / "messages").iterdir()), "a wake-up to be taken")
        assert worker.poll() is None
        worker.terminate()
        assert worker.wait() == 0
        database.close()


def test_a_job_of_several_processes_has_a_queue_of_its_own(db, values, supervised):
    job = submit(db, train(steps=2, processes=2, batch_size=8)).job
    assert job.queue == "train.multi"
    claim = queue.claim(db, ["train.multi"], worker="tester", lease_s=values.lease_s)
    assert supervised.run(claim).verdict == "succeeded"
    assert len(set(child_pids(values, job.id))) == 2

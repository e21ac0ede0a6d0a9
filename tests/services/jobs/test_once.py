"""A worker for one job: claim, run, end; nothing to do is no failure; stopped, the job goes back."""

from __future__ import annotations

import pytest

from distill_service.jobs import queue, requests
from distill_service.jobs.database import Database
from distill_service.jobs.table import State
from distillery_trainer import worker
from tests.services.jobs.jobs_stack import (
    history,
    processes,
    short_settings,
    step_of,
    submit,
    train,
    wait_for,
)

ONCE = """
import sys
from distill_service.jobs.once import run_once
from distill_service.settings import settings
code = run_once(["train"], settings(), commands={"train": "jobs_child"})
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def stack(tmp_path):
    settings = short_settings(tmp_path, broker_url=f"filesystem://{tmp_path / 'broker'}")
    with processes(settings) as running:
        yield running


@pytest.fixture
def jobs(stack):
    database = Database.open(stack.settings.database_url)
    yield database
    database.close()


def state(db: Database, job_id: str) -> State:
    return State(requests.get(db, job_id).job.state)


def test_it_runs_the_most_urgent_job_alone_and_ends(stack, jobs):
    later, urgent = (submit(jobs, train(), priority=priority).job.id for priority in (0, 5))
    assert stack.start("-c", ONCE).wait() == 0
    assert (state(jobs, urgent), state(jobs, later)) == (State.SUCCEEDED, State.QUEUED)
    assert history(jobs, urgent) == ["submitted", "claimed", "succeeded"]


def test_nothing_to_do_is_no_failure(stack, jobs):
    assert stack.start("-c", ONCE).wait() == 0
    assert "no job waits" in stack.log()


def test_a_job_that_fails_is_a_failed_job_and_not_a_failed_process(stack, jobs):
    job = submit(jobs, train(config={"exit_at": 1, "exit_code": 3})).job.id
    assert stack.start("-c", ONCE).wait() == 0
    assert state(jobs, job) == State.FAILED


def test_stopped_it_gives_the_job_back_with_its_checkpoint(stack, jobs):
    job = submit(jobs, train(steps=1000, config={"step_s": 0.02})).job.id
    process = stack.start("-c", ONCE)
    wait_for(lambda: step_of(stack.settings, job) >= 2, "two steps")
    process.terminate()
    assert process.wait() == 0
    assert state(jobs, job) == State.QUEUED
    assert history(jobs, job)[-1] == "preempted"


def test_it_takes_over_what_a_dead_worker_left(stack, jobs):
    job = submit(jobs, train()).job.id
    queue.claim(jobs, ["train"], worker="dead", lease_s=-1)
    assert stack.start("-c", ONCE).wait() == 0
    assert state(jobs, job) == State.SUCCEEDED


def test_the_trainers_worker_takes_the_option_and_still_knows_its_queues(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(worker, "settings", lambda: short_settings(tmp_path))
    assert worker.main(["--once", "eval"]) == 0
    assert worker.main(["--once", "trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err

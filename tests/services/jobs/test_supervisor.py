"""One worker's supervision of real job processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distill_core.artifacts import ArtifactStore
from distill_core.job import entry as process
from distill_service.jobs import queue, requests
from distill_service.jobs.child import Child, log_tail
from distill_service.jobs.database import Database
from distill_service.jobs.queue import Outcome
from distill_service.jobs.supervisor import Supervisor, conclude
from distill_service.jobs.table import State
from distill_service.settings import Settings
from tests.services.jobs.jobs_stack import (
    COMMANDS,
    HERE,
    alive,
    child_pids,
    history,
    short_settings,
    step_of,
    submit,
    train,
    wait_for,
)


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    return short_settings(tmp_path / "state")


@pytest.fixture
def supervisor(db: Database, values: Settings) -> Supervisor:
    return Supervisor(db, values, worker="tester", commands=COMMANDS)


def run(supervisor: Supervisor) -> Outcome | None:
    claim = queue.claim(supervisor.db, ["train"], worker="tester", lease_s=supervisor.settings.lease_s)
    return supervisor.run(claim)


def run_beside(supervisor: Supervisor) -> threading.Thread:
    thread = threading.Thread(target=run, args=(supervisor,))
    thread.start()
    return thread


def test_a_job_runs_and_its_result_is_recorded(db, values, supervisor):
    job = submit(db, train(steps=4)).job
    assert run(supervisor).verdict == "succeeded"
    row = requests.get(db, job.id).job
    assert (row.state, row.artifact, row.metrics) == (State.SUCCEEDED, "digits@1", {"loss": 0.25})
    assert (row.progress["step"], row.progress["steps"]) == (4, 4)
    assert 'method = "dmd2"' in (values.runs / job.id / "recipe.toml").read_text()


def test_a_killed_job_goes_on_from_its_checkpoint(db, values, supervisor):
    job = submit(db, train(steps=5, config={"crash_at": 3})).job
    assert run(supervisor).verdict == "crashed"
    row = requests.get(db, job.id).job
    assert (row.state, row.crashes) == (State.QUEUED, 1)
    assert "SIGKILL" in row.error["message"]
    assert run(supervisor).verdict == "succeeded"
    assert (values.runs / job.id / "started_at").read_text() == "3"
    row = requests.get(db, job.id).job
    assert (row.attempt, row.error) == (2, {})


def test_a_job_killed_right_after_publishing_publishes_nothing_twice(db, values, supervisor):
    job = submit(db, train(config={"publish": True})).job
    assert [run(supervisor).verdict for _ in range(2)] == ["crashed", "succeeded"]
    assert requests.get(db, job.id).job.artifact == "digits@1"
    assert ArtifactStore(values.store_url).versions("digits") == [1]


def test_a_job_that_is_killed_each_time_is_given_up(db, supervisor):
    job = submit(db, train(steps=9, config={"crash_at": 1, "crashes": 3, "keeps": False})).job
    verdicts = [run(supervisor).verdict for _ in range(3)]
    row = requests.get(db, job.id).job
    assert verdicts == ["crashed"] * 3
    assert (row.state, row.crashes) == (State.FAILED, 3)
    assert "given up after 3 attempts" in row.error["message"]


def test_a_job_that_gets_further_each_time_is_not_given_up(db, values, supervisor):
    job = submit(db, train(steps=9, config={"crash_at": 1, "crashes": 6})).job
    verdicts = [run(supervisor).verdict for _ in range(7)]
    assert verdicts == ["crashed"] * 6 + ["succeeded"]
    assert (values.runs / job.id / "started_at").read_text() == "6"
    row = requests.get(db, job.id).job
    assert (row.state, row.attempt, row.crashes, row.error) == (State.SUCCEEDED, 7, 1, {})


def test_cancelling_keeps_the_checkpoint_and_a_retry_continues_it(db, values, supervisor):
    job = submit(db, train(steps=40, config={"step_s": 0.02})).job
    thread = run_beside(supervisor)
    wait_for(lambda: step_of(values, job.id) >= 3, "three steps")
    requests.cancel(db, job.id, who="operator")
    thread.join()
    row = requests.get(db, job.id).job
    reached = step_of(values, job.id)
    assert (row.state, row.error["type"]) == (State.CANCELLED, "Cancelled")
    assert 3 <= reached < 40
    requests.retry(db, job.id)
    assert run(supervisor).verdict == "succeeded"
    assert (values.runs / job.id / "started_at").read_text() == str(reached)
    assert "cancel_requested" in history(db, job.id)


def test_a_job_that_ignores_the_request_to_stop_is_killed_after_the_grace(db, values, supervisor):
    object.__setattr__(values, "stop_grace_s", 0.5)
    job = submit(db, train(steps=4000, config={"step_s": 0.02, "ignore_sigterm": True})).job
    thread = run_beside(supervisor)
    wait_for(lambda: step_of(values, job.id) >= 1, "a step")
    requests.cancel(db, job.id)
    thread.join()
    assert requests.get(db, job.id).job.state == State.CANCELLED
    assert not any(alive(pid) for pid in child_pids(values, job.id))


def test_stopping_the_worker_gives_the_job_back_without_counting(db, values, supervisor):
    job = submit(db, train(steps=4000, config={"step_s": 0.02})).job
    thread = run_beside(supervisor)
    wait_for(lambda: step_of(values, job.id) >= 1, "a step")
    supervisor.stop()
    thread.join()
    row = requests.get(db, job.id).job
    assert (row.state, row.attempt, row.crashes) == (State.QUEUED, 1, 0)
    assert history(db, job.id)[-1] == "preempted"


def test_a_superseded_job_is_ended_at_once(db, values, supervisor):
    job = submit(db, train(steps=4000, config={"step_s": 0.02})).job
    outcomes: list[Outcome | None] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(supervisor)))
    thread.start()
    wait_for(lambda: step_of(values, job.id) >= 1, "a step")
    with db.write() as session:  # what a reaper and another worker's claim do
        row = session.merge(requests.get(db, job.id).job)
        row.attempt += 1
    thread.join()
    assert outcomes == [None]
    assert not any(alive(pid) for pid in child_pids(values, job.id))
    assert requests.get(db, job.id).job.state == State.RUNNING


def test_the_users_mistake_is_the_jobs_error(db, supervisor):
    said = {"type": "DataError", "message": "folder /x has no pictures", "field": "data.path"}
    job = submit(db, train(config={"exit_at": 1, "exit_code": 65, "error": said})).job
    assert run(supervisor).verdict == "failed"
    error = requests.get(db, job.id).job.error
    assert {key: error[key] for key in said} == said


def test_a_process_that_fails_without_a_word_leaves_its_last_log_lines(db, supervisor):
    job = submit(db, train(config={"exit_at": 1, "exit_code": 9})).job
    run(supervisor)
    error = requests.get(db, job.id).job.error
    assert "exit code 9: last words" in error["message"]
    assert "starting at 0" in error["log"]


def test_what_is_unavailable_is_tried_again_later(db, supervisor):
    job = submit(db, train(config={"exit_at": 1, "exit_code": 75})).job
    assert run(supervisor).verdict == "crashed"
    row = requests.get(db, job.id).job
    assert row.state == State.QUEUED
    assert row.not_before > row.started


@pytest.mark.parametrize(
    ("code", "asked", "verdict"),
    [
        (0, {}, "succeeded"),
        (0, {"cancelled": True}, "succeeded"),  # it had published already
        (143, {"cancelled": True}, "cancelled"),
        (143, {"preempted": True}, "preempted"),
        (143, {}, "crashed"),
        (-15, {"preempted": True}, "preempted"),
        (-9, {}, "crashed"),
        (137, {}, "crashed"),
        (-11, {}, "crashed"),
        (70, {}, "failed"),
        (75, {}, "crashed"),
        (68, {}, "failed"),
        (2, {"cancelled": True}, "failed"),
        (1, {}, "failed"),
    ],
)
def test_each_exit_code_has_one_meaning(code, asked, verdict):
    assert conclude(code, **asked).verdict == verdict


def test_running_out_of_memory_names_the_batch_size():
    assert "batch_size" in conclude(70).error["message"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 70, "out of memory; lower batch_size or raise accumulate"),
        (RuntimeError("CUDA out of memory. Tried"), 70, "out of memory (CUDA out of memory. Tried); lower"),
        (RuntimeError(), 1, "internal error: RuntimeError: no message"),
        (KeyError("x"), 1, "internal error: KeyError: 'x'"),
    ],
)
def test_whatever_ends_a_job_is_told_as_an_event(error, code, said, tmp_path, capfd):
    def job(*_arguments):
        raise error

    spec = tmp_path / "spec.json"
    spec.write_text("{}")
    before = signal.getsignal(signal.SIGTERM)
    stdout = os.dup(1)
    try:
        assert process.main([str(spec)], run=job) == code
    finally:
        os.dup2(stdout, 1)  # the job process gives its own away to libraries
        os.close(stdout)
        signal.signal(signal.SIGTERM, before)
    event = json.loads(capfd.readouterr().out)
    assert event["event"] == "error"
    assert said in event["message"]


def test_a_child_dies_with_the_process_that_started_it(tmp_path):
    program = (
        "import subprocess, sys, time; from distill_service.jobs.guard import guarded\n"
        "child = subprocess.Popen(guarded('sleep', '60'), start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(child), "the child to die")


def test_an_earlier_attempt_that_still_runs_is_ended_before_the_next_begins(tmp_path, monkeypatch):
    (tmp_path / "napper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spec = tmp_path / "spec.json"
    spec.write_text("{}")
    frozen = Child("napper", spec, log=tmp_path / "log.txt")
    following = Child("napper", spec, log=tmp_path / "log.txt")
    try:
        wait_for(frozen.exited, "the earlier attempt to end")
        assert frozen.returncode == -signal.SIGKILL
        assert not following.exited()
    finally:
        following.end()


def test_output_that_is_no_message_goes_to_the_log(tmp_path, monkeypatch):
    lines = "print('a library says hello'); print('[1]'); print('{\"event\": \"progress\", \"step\": 1}')"
    (tmp_path / "talker.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "spec.json").write_text("{}")
    child = Child("talker", tmp_path / "spec.json", log=tmp_path / "log.txt")
    found = []
    while not child.exited():
        found += child.events(0.1)
    found += child.events(0.0)
    assert found == [{"event": "progress", "step": 1}]
    assert log_tail(tmp_path / "log.txt") == "a library says hello\n[1]"


def test_a_job_that_cannot_be_started_fails_with_a_sentence(db, values, supervisor):
    values.runs.parent.mkdir(parents=True)
    values.runs.write_text("a file where the folder of runs should be")
    job = submit(db, train(), max_attempts=1).job
    run(supervisor)
    row = requests.get(db, job.id).job
    assert row.state == State.FAILED
    assert "could not be started" in row.error["message"]

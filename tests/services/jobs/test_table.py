"""The job table's guarantees, on SQLite and PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from prometheus_client import CollectorRegistry, generate_latest

from distill_core.errors import ConfigError, NotFound, Unavailable
from distill_service.jobs import queue, requests
from distill_service.jobs.database import Database
from distill_service.jobs.listing import Filters, list_jobs
from distill_service.jobs.metrics import JobTableCollector
from distill_service.jobs.queue import Claim, Outcome
from distill_service.jobs.specs import Draft
from distill_service.jobs.table import Base, Kind, State
from distill_service.status import StatusError
from tests.services.jobs.jobs_stack import convert, history, submit, train

ALL = ("train", "convert", "eval")


def take(database: Database, lease_s: float = 30.0, queues: tuple[str, ...] = ALL) -> Claim | None:
    return queue.claim(database, queues, worker="tester", lease_s=lease_s)


def state(database: Database, job_id: str) -> str:
    return requests.get(database, job_id).job.state


def student_and_onnx(database: Database) -> tuple[str, str, str]:
    whole = submit(database, train("student"), convert("{student}", "onnx"), pipeline=True)
    return whole.job.id, whole.stages[0].id, whole.stages[1].id


def test_migrations_make_exactly_the_tables_of_the_models(table):
    def seen(_object: object, name: str | None, *_: object) -> bool:
        return name != "ix_jobs_claimed" or table.engine.dialect.name != "sqlite"  # it does not tell DESC

    with table.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": seen})
        assert compare_metadata(context, Base.metadata) == []


def test_several_processes_may_migrate_at_once(table_url):
    program = "import sys; from distill_service.jobs.database import Database; Database.open(sys.argv[1])"
    started = [subprocess.Popen([sys.executable, "-c", program, table_url]) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]


def test_urgent_jobs_come_first_then_the_oldest(table):
    ids = [submit(table, train(), priority=priority).job.id for priority in (0, 5, 0, 5)]
    taken = [take(table).id for _ in ids]
    assert taken == [ids[1], ids[3], ids[0], ids[2]]
    assert take(table) is None


def test_a_worker_claims_only_from_its_queues(table):
    submit(table, train())
    assert take(table, queues=("convert",)) is None
    assert take(table, queues=("train",)).kind == Kind.TRAIN


def test_four_processes_never_claim_one_job_twice(db):
    for _ in range(100):
        submit(db, train())
    program = (
        "import sys; from distill_service.jobs import queue\n"
        "from distill_service.jobs.database import Database\n"
        "db = Database.open(sys.argv[1])\n"
        "while claim := queue.claim(db, ['train'], worker='w', lease_s=30):\n"
        "    assert queue.finish(db, claim.id, claim.attempt, queue.Outcome('succeeded')); print(claim.id)"
    )
    command = [sys.executable, "-c", program, str(db.engine.url)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    claimed = [line for process in started for line in process.communicate()[0].split()]
    assert len(claimed) == 100
    assert len(set(claimed)) == 100


def test_connections_at_once_never_claim_one_job_twice(table):
    for _ in range(60):
        submit(table, train())

    def claim_all(_: int) -> list[str]:
        found = []
        while claim := take(table):
            assert queue.finish(table, claim.id, claim.attempt, Outcome("succeeded"))
            found.append(claim.id)
        return found

    with ThreadPoolExecutor(6) as pool:
        claimed = [job for jobs in pool.map(claim_all, range(6)) for job in jobs]
    assert len(claimed) == 60
    assert len(set(claimed)) == 60


def test_a_stale_attempt_changes_nothing(table):
    job = submit(table, train()).job
    old = take(table, lease_s=-0.05)
    assert queue.reap(table) == [job.id]
    new = take(table)
    assert (old.attempt, new.attempt) == (1, 2)
    assert queue.heartbeat(table, job.id, old.attempt, lease_s=30) is None
    assert queue.cancel_requested(table, job.id, old.attempt) is None
    assert not queue.finish(table, job.id, old.attempt, Outcome("succeeded", artifact="wrong@1"))
    assert state(table, job.id) == State.RUNNING
    assert queue.finish(table, job.id, new.attempt, Outcome("succeeded", artifact="right@1"))
    assert requests.get(table, job.id).job.artifact == "right@1"
    assert not queue.finish(table, job.id, new.attempt, Outcome("failed"))
    assert state(table, job.id) == State.SUCCEEDED


def test_a_renewed_lease_is_not_reaped(table):
    job = submit(table, train()).job
    claim = take(table, lease_s=-0.05)
    assert queue.heartbeat(table, job.id, claim.attempt, lease_s=30, progress={"step": 7}) is False
    assert queue.reap(table) == []
    assert requests.get(table, job.id).job.progress == {"step": 7}


def test_a_job_whose_worker_dies_each_time_is_given_up(table):
    job = submit(table, train(), max_attempts=3).job
    for _ in range(3):
        take(table, lease_s=-0.05)
        queue.reap(table)
    row = requests.get(table, job.id).job
    assert (row.state, row.attempt, row.crashes) == (State.FAILED, 3, 3)
    assert "fell silent" in row.error["message"]
    assert "given up after 3 attempts" in row.error["message"]


def test_crashes_count_from_the_last_new_checkpoint(table):
    job = submit(table, train(), max_attempts=3).job

    def end(kept: int, verdict: str = "crashed") -> tuple[State, int]:
        claim = take(table)
        queue.finish(table, job.id, claim.attempt, Outcome(verdict, progress={queue.KEPT: kept}))
        row = requests.get(table, job.id).job
        return row.state, row.crashes

    assert [end(5), end(5), end(6)] == [(State.QUEUED, 1), (State.QUEUED, 2), (State.QUEUED, 1)]
    assert end(6) == (State.QUEUED, 2)
    assert end(7, "preempted") == (State.QUEUED, 2)
    assert end(7) == (State.QUEUED, 1)
    assert [end(3), end(7)] == [(State.QUEUED, 2), (State.FAILED, 3)]


def test_preemption_does_not_count_as_an_attempt(table):
    job = submit(table, train(), max_attempts=2).job
    for _ in range(5):
        claim = take(table)
        queue.finish(table, job.id, claim.attempt, Outcome("preempted"))
    row = requests.get(table, job.id).job
    assert (row.state, row.attempt, row.crashes) == (State.QUEUED, 5, 0)


def test_a_delayed_job_is_not_claimed_before_its_time(table):
    submit(table, train())
    claim = take(table)
    queue.finish(table, claim.id, claim.attempt, Outcome("crashed", delay_s=60))
    assert take(table) is None
    with table.write() as session:  # a minute later
        session.execute(sa.text("UPDATE jobs SET not_before = not_before - 60.5"))
    assert take(table).attempt == 2


def test_only_one_reaper_leads(table):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: queue.lead(table, "reaper", holder=str(n), for_s=5), range(8)))
    assert won.count(True) == 1


def test_reaping_leaves_a_running_pipeline_alone(table):
    whole, student, _ = student_and_onnx(table)
    take(table)
    assert state(table, whole) == State.RUNNING
    assert queue.reap(table) == []
    assert "lease_expired" not in history(table, whole)
    assert state(table, student) == State.RUNNING


def test_a_stage_waits_for_its_parent_and_gets_what_it_published(table):
    whole, student, onnx = student_and_onnx(table)
    claim = take(table)
    assert claim.id == student
    assert take(table) is None
    queue.finish(table, student, claim.attempt, Outcome("succeeded", artifact="digits@4"))
    assert queue.child_queues(table, student) == {"convert"}
    claim = take(table)
    assert (claim.id, claim.spec["artifact"]) == (onnx, "digits@4")
    queue.finish(table, onnx, claim.attempt, Outcome("succeeded", artifact="digits@5"))
    row = requests.get(table, whole).job
    assert (row.state, row.artifact) == (State.SUCCEEDED, "digits@5")


def test_a_failed_stage_cancels_those_that_wait_and_a_retry_brings_them_back(table):
    whole, student, onnx = student_and_onnx(table)
    claim = take(table)
    queue.finish(table, student, claim.attempt, Outcome("failed", error={"type": "X", "message": "diverged"}))
    waiting = requests.get(table, onnx).job
    assert waiting.state == State.CANCELLED
    assert f"student ({student}), which it needs, is FAILED" in waiting.error["message"]
    row = requests.get(table, whole).job
    assert row.state == State.FAILED
    assert f"stage student ({student}): diverged" in row.error["message"]
    with pytest.raises(StatusError, match="retry that one"):
        requests.retry(table, onnx)
    requests.retry(table, student)
    assert [state(table, job) for job in (whole, student, onnx)] == [State.QUEUED] * 3
    assert take(table).id == student


def test_a_stage_that_was_cancelled_by_hand_stays_so_when_its_parent_is_retried(table):
    _, student, onnx = student_and_onnx(table)
    claim = take(table)
    requests.cancel(table, onnx, who="operator")
    queue.finish(table, student, claim.attempt, Outcome("failed", error={"message": "diverged"}))
    assert requests.get(table, onnx).job.error["message"] == "cancelled before it started"
    requests.retry(table, student)
    assert [state(table, job) for job in (student, onnx)] == [State.QUEUED, State.CANCELLED]


def test_a_retried_job_has_no_end_until_it_ends_again(table):
    job = submit(table, train()).job
    queue.finish(table, job.id, take(table).attempt, Outcome("failed", error={"message": "diverged"}))
    assert requests.get(table, job.id).job.finished is not None
    requests.retry(table, job.id)
    assert requests.get(table, job.id).job.finished is None


def test_a_pipeline_starts_with_its_first_stage_and_shows_what_its_last_published(table):
    whole, student, onnx = student_and_onnx(table)
    queue.finish(table, student, take(table).attempt, Outcome("succeeded", artifact="digits@4"))
    queue.finish(table, onnx, take(table).attempt, Outcome("succeeded", artifact="digits@5"))
    begun = [requests.get(table, job).job.started for job in (student, onnx)]
    assert begun[0] < begun[1]
    assert requests.get(table, whole).job.started == begun[0]
    assert requests.get(table, whole).job.artifact == "digits@5"


def test_retrying_a_pipeline_keeps_what_has_succeeded(table):
    whole, student, onnx = student_and_onnx(table)
    claim = take(table)
    queue.finish(table, student, claim.attempt, Outcome("succeeded", artifact="digits@1"))
    claim = take(table)
    queue.finish(table, onnx, claim.attempt, Outcome("failed", error={"message": "parity"}))
    requests.retry(table, whole)
    assert (state(table, student), state(table, onnx)) == (State.SUCCEEDED, State.QUEUED)
    assert state(table, whole) == State.RUNNING


def test_cancelling_a_pipeline_stops_its_running_and_its_waiting_stages(table):
    whole, student, onnx = student_and_onnx(table)
    claim = take(table)
    requests.cancel(table, whole, who="operator")
    assert state(table, onnx) == State.CANCELLED
    assert queue.cancel_requested(table, student, claim.attempt) is True
    queue.finish(table, student, claim.attempt, Outcome("cancelled"))
    assert state(table, whole) == State.CANCELLED


def test_a_cancelled_job_whose_worker_dies_is_not_run_again(table):
    job = submit(table, train()).job
    take(table, lease_s=-0.05)
    requests.cancel(table, job.id)
    queue.reap(table)
    assert state(table, job.id) == State.CANCELLED


def test_a_finished_job_can_be_neither_cancelled_nor_retried(table):
    job = submit(table, train()).job
    claim = take(table)
    queue.finish(table, job.id, claim.attempt, Outcome("succeeded"))
    with pytest.raises(StatusError, match="SUCCEEDED already"):
        requests.cancel(table, job.id)
    with pytest.raises(StatusError, match="only one that FAILED or was CANCELLED"):
        requests.retry(table, job.id)
    with pytest.raises(NotFound, match="no job has the id"):
        requests.retry(table, "nobody")


def test_one_idempotency_key_makes_one_job_however_often_it_is_sent(table):
    with ThreadPoolExecutor(8) as pool:
        records = pool.map(lambda _: submit(table, train(), idempotency_key="k"), range(8))
        assert len({record.job.id for record in records}) == 1
    with pytest.raises(ConfigError, match="was used for another request") as caught:
        submit(table, train(steps=9), idempotency_key="k")
    assert caught.value.field == "idempotency_key"


def test_a_retried_pipeline_request_gives_the_same_pipeline(table):
    stages = (train("student"), convert("{student}", "onnx"))
    first = submit(table, *stages, pipeline=True, idempotency_key="p")
    again = submit(table, *stages, pipeline=True, idempotency_key="p")
    assert first.job.id == again.job.id
    assert len(list_jobs(table)[0]) == 3


def test_pages_hold_every_job_once_newest_first(table):
    ids = [submit(table, train()).job.id for _ in range(7)]
    found, token = [], ""
    while True:
        records, token = list_jobs(table, page_size=3, page_token=token)
        found += [record.job.id for record in records]
        if not token:
            break
    assert found == ids[::-1]
    assert len(list_jobs(table, Filters(states=[State.RUNNING]))[0]) == 0
    assert len(list_jobs(table, Filters(kinds=[Kind.TRAIN]))[0]) == 7


@pytest.mark.parametrize(("size", "token"), [(-1, ""), (501, ""), (1, "x"), (1, "9" * 40)])
def test_a_page_out_of_bounds_is_refused(db, size, token):
    with pytest.raises(ConfigError):
        list_jobs(db, page_size=size, page_token=token)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([], "1 to 64 stages"),
        ([convert("{studnet}", "onnx")], "no earlier stage"),
        ([train("student"), convert("{studnet}", "onnx")], "did you mean 'student'"),
        ([train("a"), train("a")], "two stages are called 'a'"),
        ([train("a", publish=None), convert("{a}", "b")], "publishes nothing"),
        ([train("../a")], "not a plain name"),
        ([convert("{b}", "a"), train("b")], "no earlier stage"),
    ],
)
def test_a_pipeline_that_cannot_work_is_refused(db, stages: list[Draft], said):
    with pytest.raises(ConfigError, match=said):
        submit(db, *stages, pipeline=True)
    assert list_jobs(db) == ([], "")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"labels": {str(n): "" for n in range(33)}}, "labels"),
        ({"labels": {"": "x"}}, "labels"),
        ({"name": "x" * 129}, "name"),
        ({"priority": 1001}, "priority"),
        ({"idempotency_key": "k" * 129}, "idempotency_key"),
    ],
)
def test_options_out_of_bounds_are_refused(db, options, field):
    with pytest.raises(ConfigError) as caught:
        submit(db, train(), **options)
    assert caught.value.field == field


def test_a_database_that_does_not_answer_is_one_sentence_without_its_password():
    url = "postgresql://distillery:secret@127.0.0.1:1/jobs"
    with pytest.raises(Unavailable, match="DISTILLERY_DATABASE_URL") as caught:
        Database.open(url, wait_s=0)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_to_a_removed_file_and_one_that_is_put_back_is_used(db, tmp_path):
    path = Path(str(db.engine.url.database))
    first = submit(db, train()).job
    db.close()  # everything is in the file itself
    backup = path.rename(tmp_path / "backup")
    with pytest.raises(Unavailable, match="the file cannot be read"):
        submit(db, train())
    assert not path.exists()
    with pytest.raises(Unavailable):
        requests.get(db, first.id)
    backup.rename(path)
    assert requests.get(db, first.id).job.id == first.id
    with db.read() as session:  # a connection in use stays with what it has, until it is done
        session.execute(sa.text("SELECT count(*) FROM jobs"))
        db.engine.dispose()
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        assert session.scalar(sa.text("SELECT count(*) FROM jobs")) == 1
    Database.open(f"sqlite:///{path}").close()
    with pytest.raises(NotFound):
        requests.get(db, first.id)


def test_dropped_tables_are_one_sentence(table):
    submit(table, train())
    Base.metadata.drop_all(table.engine)
    with pytest.raises(Unavailable, match="the job table at .* cannot be used"):
        submit(table, train())


def test_figures_come_from_the_table(table):
    submit(table, train())
    job = submit(table, train(), priority=1).job
    take(table, lease_s=-0.05)
    queue.reap(table)
    claim = take(table)
    queue.finish(table, job.id, claim.attempt, Outcome("succeeded"))
    registry = CollectorRegistry()
    registry.register(JobTableCollector(table))
    text = generate_latest(registry).decode()
    assert 'distillery_jobs{kind="train",state="QUEUED"} 1.0' in text
    assert 'distillery_jobs{kind="train",state="SUCCEEDED"} 1.0' in text
    assert "distillery_lease_expired_total 1.0" in text
    assert 'distillery_job_attempts_total{reason="claimed"} 2.0' in text
    assert 'distillery_job_seconds_count{kind="train",result="SUCCEEDED"} 1.0' in text

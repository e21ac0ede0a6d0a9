"""Pauses, parents, sweeps, owners and migrations of the job table, on SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig

from distill_core.errors import ConfigError, NotFound
from distill_service.jobs import database, pauses, queue, requests, states
from distill_service.jobs.database import Database
from distill_service.jobs.listing import Filters, list_jobs
from distill_service.jobs.queue import Outcome
from distill_service.jobs.specs import Draft
from distill_service.jobs.sweeps import MAX_JOBS, draft_sweep
from distill_service.jobs.table import Kind, State
from tests.services.jobs.jobs_stack import convert, history, submit, train

ALL = ("train", "convert", "eval")


def take(table, *queues: str) -> queue.Claim | None:
    return queue.claim(table, queues or ALL, worker="w", lease_s=30)


def succeed(table, claim: queue.Claim, artifact: str = "digits@1") -> None:
    assert queue.finish(table, claim.id, claim.attempt, Outcome("succeeded", artifact=artifact))


def row(table, job_id: str) -> requests.Job:
    return requests.get(table, job_id).job


# -- pauses


def test_nothing_is_claimed_from_a_paused_queue_and_what_runs_goes_on(table):
    first, second = submit(table, train()).job, submit(table, train()).job
    other = submit(table, convert("digits@1")).job
    claim = take(table)
    assert claim.id == first.id
    paused = pauses.set_paused(table, "train", True, reason="driver update", who="ann")
    assert (paused.paused, paused.reason, paused.who) == (True, "driver update", "ann")
    assert (paused.queued, paused.running) == (1, 1)
    assert not queue.waiting(table, ["train"])
    assert take(table, "train") is None
    assert take(table).id == other.id
    assert queue.heartbeat(table, first.id, claim.attempt, lease_s=30) is False
    succeed(table, claim)
    resumed = pauses.set_paused(table, "train", False, who="ben")
    assert (resumed.paused, resumed.reason, resumed.who) == (False, "", "ben")
    assert queue.waiting(table, ["train"])
    assert take(table).id == second.id


def test_a_pause_outlives_the_server_and_is_said_once(table):
    pauses.set_paused(table, "eval", True, reason="first", who="ann")
    again = pauses.set_paused(table, "eval", True, reason="second", who="ben")
    assert (again.reason, again.who) == ("first", "ann")
    reopened = Database.open(table.engine.url.render_as_string(hide_password=False))
    try:
        assert [(q.name, q.paused) for q in pauses.queue_states(reopened)] == [
            ("convert", False),
            ("eval", True),
            ("train", False),
            ("train.multi", False),
        ]
    finally:
        reopened.close()


def test_several_may_pause_at_once(table):
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: pauses.set_paused(table, "train", True, who=str(n)), range(6)))
    assert len({state.who for state in found}) == 1


@pytest.mark.parametrize("name", ["", "trian", "x" * 5000])
def test_an_unknown_queue_is_refused(db, name):
    with pytest.raises(NotFound, match="no queue is called") as caught:
        pauses.set_paused(db, name, True)
    assert caught.value.field == "name"
    assert len(str(caught.value)) < 300


# -- parents


def test_a_job_with_two_parents_starts_after_both_whoever_is_last(table):
    last = Draft(Kind.TRAIN, train().spec, "last", "last", ("a", "b"), publishes=False)
    whole = submit(table, train("a"), train("b"), last, pipeline=True)
    a, b = take(table), take(table)
    child = whole.stages[2].id
    assert row(table, child).waits == 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda claim: succeed(table, claim), (a, b)))
    assert row(table, child).waits == 0
    assert take(table).id == child


def test_a_retried_parent_is_waited_for_again(table):
    whole = submit(table, train("a"), convert("{a}", "onnx"), pipeline=True)
    first, child = (stage.id for stage in whole.stages)
    claim = take(table)
    queue.finish(table, claim.id, claim.attempt, Outcome("failed", error={"message": "diverged"}))
    requests.retry(table, first)
    assert (row(table, child).state, row(table, child).waits) == (State.QUEUED, 1)
    succeed(table, take(table))
    assert take(table).id == child


def test_a_pipeline_that_was_left_between_two_writes_is_brought_up_to_date(table, monkeypatch):
    whole = submit(table, train("a"), pipeline=True)
    claim = take(table)
    monkeypatch.setattr(queue, "refresh_pipeline", lambda *_: None)  # the worker dies right here
    succeed(table, claim)
    monkeypatch.undo()
    assert row(table, whole.job.id).state == State.RUNNING
    queue.reap(table)
    assert row(table, whole.job.id).state == State.SUCCEEDED
    with table.read() as session:
        assert states.stale_pipelines(session) == []


# -- sweeps


def sweep(table, *axes: tuple[str, list[str]], **options) -> list[requests.Job]:
    drafts = draft_sweep(axes, toml='method = "dmd2"\nsteps = 3')
    first = requests.submit(table, drafts, requests.Options(**options), sweep=True)
    return [record.job for record in requests.sweep_of(table, first.job)]


def test_a_sweep_queues_a_job_for_each_combination_under_one_label(table):
    jobs = sweep(
        table, ("seed", ["1", "2"]), ("optim.student.lr", ["1e-4", "3e-4"]), labels={"team": "a"}, who="ann"
    )
    assert [(job.spec["recipe"]["seed"], job.spec["recipe"]["optim"]["student"]["lr"]) for job in jobs] == [
        (1, 1e-4),
        (1, 3e-4),
        (2, 1e-4),
        (2, 3e-4),
    ]
    label = {"sweep": jobs[0].id, "team": "a", "seed": "1", "optim.student.lr": "1e-4"}
    assert (jobs[0].labels, jobs[0].name, jobs[0].owner) == (label, "dmd2 seed=1 lr=1e-4", "ann")
    found, _ = list_jobs(table, Filters(labels={"sweep": jobs[0].id, "seed": "2"}))
    assert [record.job.id for record in found] == [jobs[3].id, jobs[2].id]


def test_a_sweep_sent_twice_is_queued_once(table):
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: sweep(table, ("seed", ["1", "2"]), idempotency_key="k"), range(4)))
    assert len({tuple(job.id for job in jobs) for jobs in several}) == 1
    assert len(list_jobs(table)[0]) == 2


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([], "1 to 8 keys"),
        ([("seed", [])], "one value or more"),
        ([("seed", ["1", "1"])], "each of them once"),
        ([("seed", ["1"]), ("seed", ["2"])], "given twice"),
        ([("steps", ["1"])], "given twice"),
        ([(f"k{n}", ["1"]) for n in range(9)], "1 to 8 keys"),
        ([("seed", [str(n) for n in range(MAX_JOBS + 1)])], "at most 256 jobs, this one 257"),
        ([("seed", [str(n) for n in range(100)]), ("batch_size", ["1", "2", "3"])], "this one 300"),
        ([("seed", ["1", "-1"])], "seed = -1 is not allowed.*in the sweep's job seed=-1"),
        ([("sed", ["1", "2"])], "did you mean 'seed'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_whole(db, axes, said):
    with pytest.raises(ConfigError, match=said):
        draft_sweep(axes, name="dmd2", overrides={"steps": "3"})
    assert list_jobs(db) == ([], "")


def test_the_label_of_sweeps_cannot_be_taken(db):
    with pytest.raises(ConfigError, match="given to sweeps only"):
        submit(db, train(), labels={"sweep": "x"})
    with pytest.raises(ConfigError, match="33 labels|34 labels"):
        sweep(db, ("seed", ["1", "2"]), labels={str(n): "" for n in range(32)})
    assert list_jobs(db) == ([], "")


# -- owners


def test_who_submitted_a_job_owns_it_and_its_stages(table):
    whole = submit(table, train("a"), convert("{a}", "b"), pipeline=True, who="ann")
    assert {whole.job.owner, *(stage.owner for stage in whole.stages)} == {"ann"}


# -- migrations


def migrate(table: Database, revision: str) -> None:
    config = AlembicConfig()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with table.engine.begin() as connection:
        config.attributes["connection"] = connection
        step = command.downgrade if revision < "0002" else command.upgrade
        step(config, revision)


def test_migrations_go_down_and_up_and_keep_the_jobs(table):
    whole = submit(table, train("a"), convert("{a}", "onnx"), pipeline=True, who="ann", labels={"team": "x"})
    plain = submit(table, train(steps=7), priority=3, who="ben", idempotency_key="k").job
    before = [record.job for record in list_jobs(table)[0]]
    migrate(table, "0001")
    with table.engine.connect() as connection:
        names = set(sa.inspect(connection).get_table_names())
        columns = {column["name"] for column in sa.inspect(connection).get_columns("jobs")}
        rows = connection.execute(sa.text("SELECT id, labels, priority FROM jobs ORDER BY seq")).all()
    assert not names & {"job_labels", "job_queues"}
    assert not columns & {"waits", "owner"}
    assert len(rows) == 4
    migrate(table, "0002")
    after = [record.job for record in list_jobs(table)[0]]
    fields = (
        "id",
        "name",
        "state",
        "priority",
        "labels",
        "owner",
        "waits",
        "created",
        "seq",
        "idempotency_key",
    )
    assert [[getattr(job, f) for f in fields] for job in after] == [
        [getattr(job, f) for f in fields] for job in before
    ]
    assert (row(table, plain.id).spec["recipe"]["steps"], row(table, plain.id).owner) == (7, "ben")
    child = whole.stages[1].id
    assert row(table, child).waits == 1
    assert len(list_jobs(table, Filters(labels={"team": "x"}))[0]) == 3
    assert [take(table).id for _ in range(2)] == [plain.id, whole.stages[0].id]
    assert take(table) is None
    assert history(table, plain.id) == ["submitted", "claimed"]


def test_going_all_the_way_down_leaves_an_empty_database_that_can_be_used_again(table):
    submit(table, train())
    config = AlembicConfig()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with table.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    table.migrate()
    assert list_jobs(table) == ([], "")
    submit(table, train())
    assert take(table).kind == Kind.TRAIN

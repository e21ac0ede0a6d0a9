"""Lists of jobs: filters, pages that new jobs do not shift, and tokens of any content; on both databases."""

from __future__ import annotations

import base64
import json

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import app
from distill_core.errors import ConfigError
from distill_service.jobs import listing, queue, requests
from distill_service.jobs.listing import Filters, list_jobs
from distill_service.jobs.queue import Outcome
from distill_service.jobs.table import Kind, State
from distillery_cli.terminal.running import run
from tests.services.jobs.jobs_stack import convert, submit, train
from tools.temporary_postgres import initdb


def ids(table, filters: Filters | None = None, *, page_size: int = 2) -> list[str]:
    """All pages of a list."""
    found, token = [], ""
    while True:
        page, token = list_jobs(table, filters, page_size=page_size, page_token=token)
        assert len(page) <= page_size
        found += [record.job.id for record in page]
        if not token:
            return found


def finished(table, verdict: str = "succeeded") -> str:
    claim = queue.claim(table, ["train"], worker="w", lease_s=60)
    queue.finish(table, claim.id, claim.attempt, Outcome(verdict))
    return claim.id


def test_each_filter_finds_its_jobs_newest_first(table):
    jobs = [submit(table, train(), labels={"team": team, "n": str(n)}).job for n, team in enumerate("abaab")]
    other = submit(table, convert("digits@1"), labels={"team": "a"}).job
    order = [job.id for job in reversed(jobs)]
    done, failed = finished(table), finished(table, "failed")
    assert (done, failed) == (jobs[0].id, jobs[1].id)

    assert ids(table) == [other.id, *order]
    assert ids(table, Filters(states=[State.QUEUED])) == [other.id, *order[:3]]
    assert ids(table, Filters(states=[State.SUCCEEDED, State.FAILED])) == order[3:]
    assert ids(table, Filters(kinds=[Kind.CONVERT])) == [other.id]
    assert ids(table, Filters(kinds=[Kind.CONVERT], states=[State.FAILED])) == []
    assert ids(table, Filters(labels={"team": "a"})) == [other.id, jobs[3].id, jobs[2].id, jobs[0].id]
    both = Filters(labels={"team": "a", "n": "2"})
    assert ids(table, both) == [jobs[2].id]
    assert ids(table, Filters(labels={"team": "a"}, states=[State.SUCCEEDED])) == [jobs[0].id]
    assert ids(table, Filters(labels={"team": "a"}, kinds=[Kind.CONVERT])) == [other.id]
    middle = Filters(created_after=jobs[1].created, created_before=jobs[3].created)
    assert ids(table, middle) == [jobs[2].id, jobs[1].id]
    timed = Filters(labels={"team": "a"}, created_after=jobs[2].created, created_before=jobs[3].created)
    assert ids(table, timed) == [jobs[2].id]
    assert ids(table, Filters(states=[State.QUEUED], created_before=jobs[3].created)) == [jobs[2].id]


@pytest.mark.parametrize(
    "filters",
    [Filters(), Filters(states=[State.QUEUED, State.RUNNING]), Filters(labels={"team": "a"})],
    ids=["all", "states", "label"],
)
def test_jobs_that_come_between_two_pages_shift_and_double_nothing(table, filters):
    before = [submit(table, train(), labels={"team": "a"}).job.id for _ in range(5)]
    first, token = list_jobs(table, filters, page_size=2)
    for _ in range(3):
        submit(table, train(), labels={"team": "a"}, priority=5)
    found = [record.job.id for record in first]
    while token:
        page, token = list_jobs(table, filters, page_size=2, page_token=token)
        found += [record.job.id for record in page]
    assert found == before[::-1]


def test_jobs_of_one_moment_are_each_listed_once(table):
    before = [submit(table, train(), labels={"team": "a"}).job.id for _ in range(5)]
    with table.write() as session:
        session.execute(sa.text("UPDATE jobs SET created = 1000.1"))
        session.execute(sa.text("UPDATE job_labels SET created = 1000.1"))
    for filters in (Filters(), Filters(states=[State.QUEUED]), Filters(labels={"team": "a"})):
        assert ids(table, filters) == before[::-1]


def test_a_list_does_not_carry_the_requests_and_counts_no_more_than_it_is_asked_for(db):
    for _ in range(3):
        submit(db, train())
    page, token = list_jobs(db, page_size=3)
    assert token == ""
    assert "spec" not in page[0].job.__dict__
    assert requests.get(db, page[0].job.id).job.spec["recipe"]["steps"] == 3


@pytest.mark.parametrize(
    "filters",
    [
        Filters(labels={"": "x"}),
        Filters(labels={"a b": "x"}),
        Filters(labels={"a": "x" * 257}),
        Filters(created_after=2.0, created_before=1.0),
    ],
)
def test_a_filter_that_no_job_can_meet_is_refused(db, filters):
    with pytest.raises(ConfigError):
        list_jobs(db, filters)


def test_a_token_goes_with_its_filters_only(db):
    for _ in range(3):
        submit(db, train())
    _, token = list_jobs(db, Filters(states=[State.QUEUED]), page_size=1)
    assert list_jobs(db, Filters(states=[State.QUEUED]), page_size=1, page_token=token)[0]
    for other in (Filters(), Filters(states=[State.RUNNING]), Filters(labels={"a": "b"})):
        with pytest.raises(ConfigError, match="not one that List gave for these filters") as caught:
            list_jobs(db, other, page_token=token)
        assert caught.value.field == "page_token"


@given(st.one_of(st.text(), st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode())))
def test_any_token_is_read_or_refused_in_one_sentence(token):
    with pytest.raises(ConfigError, match="page_token"):
        listing._read_token(token, Filters())


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**63 - 1))
def test_a_token_says_where_the_page_ended(created, seq):
    job = requests.Job(created=created, seq=seq)
    place = listing._read_token(listing._token(job, Filters()), Filters())
    assert (place.created, place.seq) == (created, seq)


def test_a_claim_and_each_list_walk_an_index_and_sort_nothing_long(db):
    """SQLite's own plan: a sort shows as a temporary tree, a walk of the whole table as SCAN jobs."""
    for n in range(20):
        submit(db, train(), labels={"team": str(n % 3)})
    statements: list[tuple[str, object]] = []

    def note(_connection, _cursor, statement, parameters, *_):
        if statement.lstrip().startswith(("SELECT", "UPDATE")):
            statements.append((statement, parameters))

    sa.event.listen(db.engine, "before_cursor_execute", note)
    list_jobs(db, page_size=5)
    list_jobs(db, Filters(labels={"team": "1"}), page_size=5)
    list_jobs(db, Filters(created_after=1.0, created_before=2.0), page_size=5)
    queue.claim(db, ["train", "eval"], worker="w", lease_s=60)
    sa.event.remove(db.engine, "before_cursor_execute", note)
    with db.engine.connect() as connection:
        plans = [
            (
                statement,
                [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", given)],
            )
            for statement, given in statements
            if "jobs" in statement
        ]
    assert len(plans) >= 6
    for statement, plan in plans:
        if any("ix_jobs_pipeline" in line for line in plan):  # the stages of the page's pipelines
            continue
        for line in plan:
            assert "TEMP B-TREE" not in line, (statement, plan)
            assert line != "SCAN jobs", (statement, plan)


def test_the_bench_measures_each_operation_on_each_database(tmp_path, capsys):
    page = tmp_path / "page.md"
    options = ["--rounds", "3", "--largest", "200", "--out", str(tmp_path), "--page", str(page), "--json"]
    code = run(app, "python -m benchmarks", ["queue", *options])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "queue.json").read_text())
    assert report["sizes"] == [100, 200]
    assert set(report["databases"]) == {"sqlite", *(["postgresql"] if initdb() else [])}
    rows = [row for found in report["databases"].values() for row in found]
    assert {"claim", "list", "list label", "watch"} <= {row["operation"] for row in rows}
    assert all(ms > 0 for row in rows for ms in row["ms"].values())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    assert (tmp_path / "queue.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "images/queue.png").read_bytes() == (tmp_path / "queue.png").read_bytes()
    shown = page.read_text()
    assert "(images/queue.png)" in shown
    for row in rows:
        costs = " | ".join(f"{ms:.2f} ms" for ms in row["ms"].values())
        assert f"| {row['operation']} | {costs} | {row['ratio']:.2f} |" in shown

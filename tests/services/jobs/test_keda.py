"""What KEDA asks the job table: how many jobs a worker could claim now, on each database by its own clock."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
import yaml
from sqlalchemy.dialects import postgresql

from distill_service.jobs import pauses, queue
from distill_service.jobs.database import Database, epoch
from distill_service.jobs.states import now
from distill_service.jobs.table import MULTI, Job
from distillery_trainer.worker import DEFAULT_QUEUES
from tests.helpers import REPOSITORY
from tests.services.jobs.jobs_stack import convert, submit, train

MANIFEST = REPOSITORY / "deploy" / "k8s" / "overlays" / "keda" / "trainer-job.yaml"


@pytest.fixture
def query(table: Database) -> sa.TextClause:
    """The trigger's question, with the clock of this database in the place of PostgreSQL's."""
    scaled = next(doc for doc in yaml.safe_load_all(MANIFEST.read_text()) if doc["kind"] == "ScaledJob")
    (pod,) = scaled["spec"]["jobTargetRef"]["template"]["spec"]["containers"]
    assert pod["command"][3:] == ["--once"]  # of all queues, so all are counted
    text = scaled["spec"]["triggers"][0]["metadata"]["query"]
    clock = str(epoch().compile(dialect=postgresql.dialect()))
    assert text.count(clock) == 2
    return sa.text(text.replace(clock, str(epoch().compile(table.engine))))


def test_keda_counts_exactly_the_jobs_that_a_worker_could_take(table, query):
    def waiting() -> int:
        with table.read() as session:
            counted = session.execute(query).scalar_one()
        assert (counted > 0) == queue.waiting(table, DEFAULT_QUEUES)
        return counted

    assert waiting() == 0
    submit(table, convert("digits@1"))  # another worker's
    submit(table, train("teacher"), train("student", ("teacher",)), pipeline=True)
    assert waiting() == 1  # not the stage that waits for another
    submit(table, train())
    assert submit(table, train(processes=2, batch_size=8)).job.queue == MULTI
    assert waiting() == 3
    claim = queue.claim(table, DEFAULT_QUEUES, worker="w", lease_s=60)
    assert waiting() == 2
    queue.finish(table, claim.id, claim.attempt, queue.Outcome("succeeded", artifact="digits@1"))
    assert waiting() == 3
    pauses.set_paused(table, MULTI, True)
    assert waiting() == 2
    pauses.set_paused(table, "train", True)
    assert waiting() == 0


def test_keda_does_not_count_a_job_whose_next_attempt_is_not_due(table, query):
    job = submit(table, train()).job

    def counted(seconds_ahead: float) -> int:
        with table.write() as session:
            due = now(session) + seconds_ahead
            session.execute(sa.update(Job).where(Job.id == job.id).values(not_before=due))
        with table.read() as session:
            return session.execute(query).scalar_one()

    assert counted(-1) == 1
    assert counted(queue.MAX_DELAY_S / 2) == 0
    assert not queue.waiting(table, DEFAULT_QUEUES)
    assert (
        counted(queue.MAX_DELAY_S + 60) == 1
    )  # written before the clock was set back, as a claim sees it too
    assert queue.waiting(table, DEFAULT_QUEUES)

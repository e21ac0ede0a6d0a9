"""What an earlier release left behind (tests/fixtures/upgrade) opens: stores, unfinished runs, job tables."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from alembic import command as alembic_command
from alembic.config import Config as AlembicConfig

from distill_core import api
from distill_core.artifacts import ArtifactStore
from distill_core.kinds.loading import load_artifact
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.tables import EvaluateConfig
from distill_core.training.checkpoint import load_latest
from distill_service.jobs import database, queue, requests
from distill_service.jobs.database import Database
from distill_service.jobs.queue import Outcome
from distill_service.jobs.table import Base, Job, State
from distillery_converter.convert import convert
from tests.helpers import REPOSITORY
from tests.services.sampler.helpers import SamplerProcess

UPGRADES = REPOSITORY / "tests" / "fixtures" / "upgrade"
RELEASES = sorted(path.name for path in UPGRADES.iterdir() if path.is_dir() and path.name[0].isdigit())


@pytest.fixture(params=RELEASES)
def left(request, tmp_path) -> Path:
    """A copy of what a release left behind."""
    torch.set_num_threads(1)
    return Path(shutil.copytree(UPGRADES / request.param, tmp_path / "left"))


def test_there_is_a_release_to_upgrade_from_and_it_is_small():
    assert RELEASES
    for release in RELEASES:
        for part in (UPGRADES / release).iterdir():
            files = [part] if part.is_file() else [path for path in part.rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in files) < 200_000, part


# -- store


def test_an_earlier_store_is_read_aliased_and_published_to(left, tmp_path):
    store = ArtifactStore(left / "store")
    assert store.names() == ["edm-digits", "procedural-scene"]
    assert store.aliases("edm-digits") == {"prod": 1, "latest": 2}
    moves = [(move.who, move.previous, move.version) for move in store.history("edm-digits")]
    assert moves == [("ann", None, 1), ("ann", 1, 2), ("ben", 2, 1)]
    manifest = store.manifest("edm-digits@prod")
    assert (manifest.kind, manifest.method, manifest.job) == ("denoiser", "edm", "job-1")
    again = store.publish(store.fetch("edm-digits@1"), manifest.model_copy(update={"job": "new"}), key="new")
    assert again.ref == "edm-digits@3"
    store.set_alias("edm-digits", "prod", 3)
    assert store.resolve("edm-digits@prod") == ("edm-digits", 3)


def test_earlier_models_compute(left, tmp_path):
    store = ArtifactStore(left / "store")
    model = load_artifact(store, "edm-digits@prod", tmp_path)
    label = {"class_label": torch.tensor([3])}
    assert torch.isfinite(model(torch.zeros(1, 1, 8, 8), torch.tensor([1.0]), label)).all()
    assert load_artifact(store, "procedural-scene", tmp_path).occupied.dtype == torch.bool


def test_an_earlier_model_is_converted_and_an_earlier_scene_rendered_by_the_sampler(left, tmp_path):
    store = ArtifactStore(left / "store")
    manifest = convert(store, "edm-digits@2", "onnx-fp32", job="job-9")
    assert (manifest.ref, manifest.parents) == ("edm-digits@3", ("edm-digits@2",))
    variables = {"DISTILLERY_CACHE_DIR": str(tmp_path / "cache"), "DISTILLERY_SAMPLER_BACKEND": "torch"}
    with SamplerProcess(str(left / "store"), variables) as process, process.client() as client:
        old, new = (client.generate(f"edm-digits@{n}", class_labels=[3], num_steps=2)[0] for n in (1, 3))
        np.testing.assert_array_equal(old, new)
        assert client.render("procedural-scene", width=8, height=8).rgb.shape == (8, 8, 3)


# -- runs


def test_an_unfinished_run_of_an_earlier_release_goes_on_where_it_stopped(left, tmp_path):
    recipe = load_recipe(left / "run" / "recipe.toml")
    step, tensors = load_latest(left / "run" / "checkpoints", method=recipe.method)
    assert step == 2
    where = api.context(tmp_path / "store", tmp_path / "cache")
    first: list[int] = []
    result = api.train(
        recipe.override({"log_every": 1}),
        left / "run",
        where,
        listener=lambda event: first.append(event["step"]) if event["event"] == "metrics" else None,
    )
    assert (first[0], result.step, result.stopped) == (3, 4, False)
    assert (left / "run" / "model" / "transformer" / "config.json").is_file()
    again, _ = load_latest(left / "run" / "checkpoints", method=recipe.method)
    assert again == 4


# -- job tables


@pytest.fixture(params=["sqlite", "postgresql"])
def table(request, left, tmp_path) -> str:
    """The URL of a job table as an earlier release left it; on PostgreSQL its rows are copied into such a table."""
    sqlite = f"sqlite:///{left / 'jobs.db'}"
    if request.param == "sqlite":
        return sqlite
    url = request.getfixturevalue("postgres_schema")
    copy(sqlite, url)
    return url


def copy(source: str, target: str) -> None:
    """Make `target` at the revision of `source`, with its rows."""
    old, new = sa.create_engine(source), Database(target).engine
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    read = sa.MetaData()
    read.reflect(old)
    with old.connect() as reader:
        revision = reader.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
        with new.begin() as writer:
            config.attributes["connection"] = writer
            alembic_command.upgrade(config, revision)
        made = sa.MetaData()
        made.reflect(new)
        with new.begin() as writer:
            writer.execute(made.tables["job_leaders"].delete())
            for table in made.sorted_tables:
                rows = [dict(row) for row in reader.execute(read.tables[table.name].select()).mappings()]
                if rows and table.name != "alembic_version":
                    writer.execute(table.insert(), rows)
            for name, column in (
                ("jobs", "seq"),
                ("job_events", "id"),
            ):  # numbers given by hand leave it behind
                highest = f"(SELECT max({column}) FROM {name})"
                writer.execute(
                    sa.text(f"SELECT setval(pg_get_serial_sequence('{name}', '{column}'), {highest})")
                )
    old.dispose()
    new.dispose()


def named(db: Database) -> dict[str, Job]:
    with db.read() as session:
        return {job.name: job for job in session.scalars(sa.select(Job))}


STATES = {
    "succeeded": State.SUCCEEDED,
    "failed": State.FAILED,
    "cancelled": State.CANCELLED,
    "running": State.RUNNING,
    "abandoned": State.RUNNING,
    "waiting": State.QUEUED,
    "pipeline": State.QUEUED,
    "edm-digits": State.QUEUED,
}


def test_every_job_of_an_earlier_table_is_there_in_its_state(table):
    db = Database.open(table)
    jobs = named(db)
    assert {name: jobs[name].state for name in STATES} == STATES
    assert jobs["succeeded"].artifact == "edm-digits@1"
    assert jobs["succeeded"].metrics == {"frechet_distance": 3.5}
    assert jobs["failed"].error["message"] == "bad"
    assert jobs["running"].progress == {"step": 2, "steps": 4}
    assert jobs["waiting"].labels == {"team": "vision", "for": "paper"}
    record = requests.get(db, jobs["pipeline"].id)
    assert [stage.stage for stage in record.stages] == ["teacher", "export"]
    assert [event.what for event in requests.events(db, jobs["failed"].id)] == [
        "submitted",
        "claimed",
        "failed",
    ]
    db.close()


def test_an_earlier_table_has_the_form_of_a_new_one(table):
    db = Database.open(table)
    made = sa.MetaData()
    made.reflect(db.engine)
    for name, wanted in Base.metadata.tables.items():
        assert {column.name for column in made.tables[name].columns} == {c.name for c in wanted.columns}, name
    db.close()


def test_an_abandoned_job_returns_to_its_queue_and_one_with_a_lease_stays(table):
    db = Database.open(table)
    jobs = named(db)
    # The old worker still lives: its lease was for an hour after the fixture was made.
    with db.write() as session:
        renewed = sa.update(Job).where(Job.id == jobs["running"].id).values(lease_until=time.time() + 600)
        session.execute(renewed)
    assert queue.reap(db) == [jobs["abandoned"].id]
    assert named(db)["abandoned"].state == State.QUEUED
    running = jobs["running"]
    assert queue.heartbeat(db, running.id, running.attempt, lease_s=60) is False  # its worker may go on
    assert queue.finish(db, running.id, running.attempt, Outcome("succeeded", artifact="edm-digits@2"))
    db.close()


def test_waiting_jobs_are_claimed_by_priority_and_a_pipeline_goes_on(table):
    db = Database.open(table)
    first, second = (queue.claim(db, ["train"], worker="new", lease_s=60) for _ in range(2))
    assert [claim.name for claim in (first, second)] == ["waiting", "edm-digits"]
    assert queue.claim(db, ["convert"], worker="new", lease_s=60) is None
    queue.finish(db, second.id, second.attempt, Outcome("succeeded", artifact="edm-digits@7"))
    export = queue.claim(db, ["convert"], worker="new", lease_s=60)
    assert export.spec["artifact"] == "edm-digits@7"
    queue.finish(db, export.id, export.attempt, Outcome("succeeded", artifact="edm-digits@8"))
    assert named(db)["pipeline"].state == State.SUCCEEDED
    db.close()


def test_what_stopped_is_retried_cancelled_and_submitted_again(table):
    db = Database.open(table)
    jobs = named(db)
    for name in ("failed", "cancelled"):
        assert requests.retry(db, jobs[name].id).job.state == State.QUEUED
    assert requests.cancel(db, jobs["waiting"].id).job.state == State.CANCELLED
    assert requests.cancel(db, jobs["pipeline"].id).job.state == State.CANCELLED
    assert queue.claim(db, ["train"], worker="new", lease_s=60).name in ("failed", "cancelled")
    db.close()


def test_the_specification_of_an_earlier_job_is_one_that_runs(left, tmp_path):
    db = Database.open(f"sqlite:///{left / 'jobs.db'}")
    claim = queue.claim(db, ["train"], worker="new", lease_s=60)
    recipe = Recipe.parse(claim.spec["recipe"]).override({"steps": 1, "batch_size": 8})
    recipe = recipe.model_copy(update={"evaluate": EvaluateConfig()})  # its judge would be trained first
    where = api.context(left / "store", tmp_path / "cache")
    assert api.train(recipe, tmp_path / "run", where, job=claim.id).manifest.ref == "edm-digits@3"
    db.close()

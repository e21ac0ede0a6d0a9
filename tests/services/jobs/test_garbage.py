"""What a collection removes and, above all, what it never does; on both databases, with a real store."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from distill_core.artifacts import MANIFEST, ArtifactStore, Manifest
from distill_core.artifacts.garbage import StoredVersion, find_garbage, remove_version
from distill_core.errors import ConfigError
from distill_service.jobs import garbage, queue, requests
from distill_service.jobs.garbage import Rules, collect
from distill_service.jobs.queue import Outcome
from tests.services.jobs.jobs_stack import convert, submit, train

DAY = 86_400.0
OLD = Rules(keep=1, older_than_s=30 * DAY)


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def publish(store: ArtifactStore, name: str, *, age_days: float = 100, **values) -> str:
    folder = Path(store.root).parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"x" * 100)
    made = store.publish(folder, Manifest(name=name, kind="denoiser", **values))
    path = Path(store.root, name, "versions", str(made.version), MANIFEST)
    content = json.loads(path.read_text())
    content["created"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - age_days * DAY))
    path.write_text(json.dumps(content))
    return made.ref


def cut_off(store: ArtifactStore, name: str, version: int, *, age_days: float, key: str = "-") -> Path:
    folder = Path(store.root, name, "versions", str(version))
    (folder / "unet").mkdir(parents=True)
    for file, data in ((folder / ".claim", key), (folder / "unet" / "weights.safetensors", "half")):
        file.write_text(data)
        os.utime(file, (time.time() - age_days * DAY,) * 2)
    return folder


def found(table, runs: Path, store: ArtifactStore, rules: Rules = OLD, *, dry_run: bool = False) -> set[str]:
    return {thing.name for thing in collect(table, runs, store, rules, dry_run=dry_run).garbage}


def ended(table, runs: Path, verdict: str = "succeeded", *, age_days: float = 100, **values) -> str:
    """A job that ended so long ago, with a run folder."""
    job = submit(table, train(**values)).job
    claim = queue.claim(table, ["train"], worker="w", lease_s=600)
    assert claim.id == job.id
    queue.finish(table, job.id, claim.attempt, Outcome(verdict))
    with table.write() as session:
        session.execute(
            sa.text("UPDATE jobs SET finished = finished - :age WHERE id = :id"),
            {"age": age_days * DAY, "id": job.id},
        )
    make_run(runs, job.id)
    return job.id


def make_run(runs: Path, job_id: str) -> Path:
    (runs / job_id).mkdir(parents=True)
    (runs / job_id / "checkpoint.safetensors").write_bytes(b"c" * 1000)
    return runs / job_id


# -- models


def test_old_versions_go_and_the_newest_young_aliased_and_parents_stay(table, store, tmp_path):
    for _ in range(3):
        publish(store, "digits")
    store.set_alias("digits", "prod", 1)
    young = publish(store, "digits", age_days=2)
    publish(store, "teacher")
    publish(store, "teacher")
    publish(store, "teacher")
    publish(store, "student", parents=("teacher@1",))
    publish(store, "lora", card={"base": "teacher@2"})
    collected = collect(table, tmp_path / "runs", store, OLD, dry_run=True)
    assert {thing.name for thing in collected.garbage} == {"digits@2", "digits@3"}
    assert all(thing.kind == "model" and thing.size > 100 for thing in collected.garbage)  # and a card
    assert dict(collected.kept) == {
        "digits@1": "alias prod",
        "teacher@1": "parent of student@1",
        "teacher@2": "parent of lora@1",
    }
    assert store.versions("digits") == [1, 2, 3, 4]
    assert found(table, tmp_path / "runs", store) == {"digits@2", "digits@3"}
    assert store.versions("digits") == [1, 4]
    assert not Path(store.root, "digits", "versions", "2").exists()
    assert store.fetch("digits@prod").is_dir()
    assert store.fetch(young).is_dir()
    assert found(table, tmp_path / "runs", store) == set()


def test_a_parent_of_what_goes_goes_too_and_numbers_are_not_given_again(table, store, tmp_path):
    publish(store, "teacher")
    publish(store, "teacher")
    publish(store, "student", parents=("teacher@1",))
    publish(store, "student")
    assert found(table, tmp_path / "runs", store) == {"teacher@1", "student@1"}
    assert publish(store, "student") == "student@3"


def test_what_a_job_that_has_not_ended_names_stays(table, store, tmp_path):
    for _ in range(6):
        publish(store, "digits")
    store.set_alias("digits", "base", 2)
    submit(table, convert("digits@1"))
    submit(table, train(teacher={"artifact": "digits@base"}))
    running = submit(table, convert("digits@3")).job
    assert queue.claim(table, ["convert"], worker="w", lease_s=600)
    failed = submit(table, convert("digits@4"), priority=9).job
    claim = queue.claim(table, ["convert"], worker="w", lease_s=600)
    assert claim.id == failed.id
    queue.finish(table, claim.id, claim.attempt, Outcome("failed"))
    collected = collect(table, tmp_path / "runs", store, OLD, dry_run=False)
    assert {thing.name for thing in collected.garbage} == {"digits@5"}
    assert store.versions("digits") == [1, 2, 3, 4, 6]
    assert requests.get(table, running.id).job.spec["artifact"] == "digits@3"
    assert "needed by job" in collected.kept["digits@4"]  # it may be retried yet


def test_what_a_stage_published_stays_as_long_as_another_waits_for_it(table, store, tmp_path):
    first = publish(store, "student")
    publish(store, "student")
    submit(table, train("student"), convert("{student}", "onnx"), pipeline=True)
    claim = queue.claim(table, ["train"], worker="w", lease_s=60)
    queue.finish(table, claim.id, claim.attempt, Outcome("succeeded", artifact=first))
    assert found(table, tmp_path / "runs", store) == set()
    claim = queue.claim(table, ["convert"], worker="w", lease_s=60)
    queue.finish(table, claim.id, claim.attempt, Outcome("succeeded"))
    assert found(table, tmp_path / "runs", store) == {first}


def test_a_version_that_is_named_at_the_last_moment_is_put_back(store):
    publish(store, "digits")
    publish(store, "digits")
    answers = iter([True, False])  # an alias is set between the question and the removal
    version = StoredVersion("digits", 1, 100, 1e9)
    assert not remove_version(store, version, lambda: next(answers))
    assert store.fetch("digits@1").is_dir()
    assert store.versions("digits") == [1, 2]


def test_an_alias_that_is_moved_to_a_version_after_the_search_saves_it(db, store, tmp_path, monkeypatch):
    publish(store, "digits")
    publish(store, "digits")
    search = garbage.find_garbage

    def moved(*arguments, **options):
        result = search(*arguments, **options)
        store.set_alias("digits", "prod", 1)
        return result

    monkeypatch.setattr(garbage, "find_garbage", moved)
    assert found(db, tmp_path / "runs", store) == set()
    assert store.fetch("digits@prod").is_dir()


def test_a_job_that_is_queued_after_the_search_saves_what_it_names(table, store, tmp_path, monkeypatch):
    publish(store, "digits")
    publish(store, "digits")
    search = garbage.find_garbage

    def queued(*arguments, **options):
        result = search(*arguments, **options)
        submit(table, convert("digits@1"))
        return result

    monkeypatch.setattr(garbage, "_IN_FLIGHT", 0)
    monkeypatch.setattr(garbage, "find_garbage", queued)
    assert found(table, tmp_path / "runs", store) == set()
    assert store.versions("digits") == [1, 2]


def test_a_removal_that_is_cut_off_leaves_an_upload_that_the_next_one_finds(db, store, tmp_path, monkeypatch):
    publish(store, "digits")
    publish(store, "digits")
    monkeypatch.setattr(
        "distill_core.artifacts.store.shutil.rmtree",
        lambda *_args: (_ for _ in ()).throw(OSError(5, "gone")),
    )
    with pytest.raises(Exception, match="cannot remove from"):
        found(db, tmp_path / "runs", store)
    monkeypatch.undo()
    assert store.versions("digits") == [2]
    for file in Path(store.root, "digits", "versions", "1").rglob("*"):
        os.utime(file, (0, 0))
    assert found(db, tmp_path / "runs", store) == {"digits@1"}
    assert not Path(store.root, "digits", "versions", "1").exists()


def test_a_version_that_cannot_be_read_stays(db, store, tmp_path):
    publish(store, "digits")
    publish(store, "digits")
    Path(store.root, "digits", "versions", "1", MANIFEST).write_text("{")
    assert found(db, tmp_path / "runs", store) == set()
    assert find_garbage(store, keep=1, older_than_s=0).versions == ()


# -- uploads


def test_uploads_that_were_cut_off_go_when_nobody_goes_on_with_them(table, store, tmp_path):
    publish(store, "digits")
    job = submit(table, train()).job
    old = cut_off(store, "digits", 2, age_days=40)
    young = cut_off(store, "digits", 3, age_days=0.5)
    wanted = cut_off(store, "digits", 4, age_days=40, key=job.id)
    only = cut_off(store, "never", 1, age_days=40, key="0123456789ab")
    assert found(table, tmp_path / "runs", store) == {"digits@2", "never@1"}
    assert [folder.exists() for folder in (old, young, wanted, only)] == [False, True, True, False]
    requests.cancel(table, job.id)
    assert found(table, tmp_path / "runs", store) == set()  # it may be retried yet
    assert found(table, tmp_path / "runs", store, Rules(1, 0.0)) >= {"digits@4"}
    assert young.exists()  # an upload may take a while, whatever the age that was asked for


# -- runs


def test_old_runs_go_and_the_newest_of_each_name_stay(table, store, tmp_path):
    runs = tmp_path / "runs"
    old, older = ended(table, runs, age_days=50), ended(table, runs, age_days=60)
    newest = ended(table, runs, age_days=40)
    young = ended(table, runs, "failed", age_days=1)
    other = ended(table, runs, age_days=90, publish="another")
    waiting = make_run(runs, submit(table, train()).job.id)
    local = make_run(runs, "edm_digits-20260101-000000-abcd")
    unknown = make_run(runs, "00000000abcd")
    rules = Rules(keep=2, older_than_s=30 * DAY)
    assert found(table, runs, store, rules, dry_run=True) == {old, older}
    assert found(table, runs, store, rules) == {old, older}
    left = {path.name for path in runs.iterdir()}
    assert left == {newest, young, other, waiting.name, local.name, unknown.name}
    assert requests.get(table, old).job.state == "SUCCEEDED"  # the table keeps its history


def test_a_run_whose_folder_is_in_use_stays(db, store, tmp_path):
    runs = tmp_path / "runs"
    jobs = [ended(db, runs, age_days=50 + n) for n in range(2)]
    with (runs / jobs[1] / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found(db, runs, store) == set()
    assert found(db, runs, store) == {jobs[1]}


def test_a_run_of_a_pipeline_that_has_not_ended_stays(db, store, tmp_path):
    runs = tmp_path / "runs"
    whole = submit(db, train("a"), train("b"), pipeline=True)
    claim = queue.claim(db, ["train"], worker="w", lease_s=60)
    queue.finish(db, claim.id, claim.attempt, Outcome("succeeded"))
    with db.write() as session:
        session.execute(sa.text("UPDATE jobs SET finished = 1.0 WHERE state = 'SUCCEEDED'"))
    make_run(runs, claim.id)
    assert garbage._old_runs(db, [claim.id], Rules(1, 0.0)) == []
    assert whole.job.state == "QUEUED"


def test_what_a_collection_that_was_killed_had_begun_is_finished(db, store, tmp_path):
    runs = tmp_path / "runs"
    left = make_run(runs, ".garbage-0123456789ab-00")
    assert found(db, runs, store, dry_run=True) == set()
    assert left.exists()
    found(db, runs, store)
    assert not left.exists()


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        (Rules(keep=0), "keep"),
        (Rules(keep=-1), "keep"),
        (Rules(older_than_s=-1.0), "older_than_seconds"),
        (Rules(older_than_s=float("nan")), "older_than_seconds"),
        (Rules(older_than_s=float("inf")), "older_than_seconds"),
    ],
)
def test_rules_out_of_bounds_are_refused(db, store, tmp_path, rules, field):
    with pytest.raises(ConfigError) as caught:
        collect(db, tmp_path, store, rules, dry_run=True)
    assert caught.value.field == field

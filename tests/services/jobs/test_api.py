"""The Jobs API as a client sees it: a real server process on loopback."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distill_core.artifacts import ArtifactStore, CondSpec, Manifest
from distill_core.errors import ArtifactError, ConfigError, DistilleryError, NotFound, Unavailable
from distill_service.jobs import queue
from distill_service.jobs.database import Database
from distill_service.jobs.queue import Outcome
from distill_service.settings import settings
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery_trainer import server, worker
from distillery_trainer.client import (
    JobsClient,
    convert_spec,
    evaluate_spec,
    pipeline_spec,
    stage,
    train_spec,
)
from tests.services.jobs.jobs_child import PNG
from tests.services.jobs.jobs_stack import Processes, processes, recipe, short_settings, wait_for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("jobs-api")
    values = short_settings(folder / "state", broker_url=f"filesystem://{folder / 'broker'}")
    with processes(values) as started:
        started.server()
        yield started


@pytest.fixture(scope="module")
def client(running: Processes) -> Iterator[JobsClient]:
    with JobsClient(f"127.0.0.1:{running.settings.jobs_port}") as jobs:
        wait_for(lambda: _answers(jobs), "the server to answer")
        yield jobs


def _answers(jobs: JobsClient) -> bool:
    try:
        jobs.list(limit=1)
    except Unavailable:
        return False
    return True


@pytest.fixture(scope="module")
def table(running: Processes, client: JobsClient) -> Iterator[Database]:
    database = Database.open(running.settings.database_url)
    yield database
    database.close()


def finish_next(table: Database, **outcome: object) -> str:
    claim = queue.claim(table, ["train"], worker="tester", lease_s=60)
    queue.finish(table, claim.id, claim.attempt, Outcome(**({"verdict": "succeeded"} | outcome)))
    return claim.id


def drain(table: Database) -> None:
    while queue.waiting(table, ["train"]):
        finish_next(table)


@pytest.mark.parametrize(
    ("work", "field", "said"),
    [
        (train_spec(recipe(stepz=3)), "stepz", "did you mean 'steps'"),
        (train_spec(recipe(steps=-1)), "steps", "-1 is not allowed"),
        (train_spec(recipe(seed=2**63)), "seed", "is not allowed"),
        (train_spec(recipe(), {"optim.student.lr": -1.0}), "optim.student.lr", "-1.0 is not allowed"),
        (jobs_pb2.TrainSpec(recipe_toml="steps = "), "recipe", "not valid TOML"),
        (jobs_pb2.TrainSpec(recipe_toml="x = " + "[" * 20_000), "recipe", "nested too deeply"),
        (jobs_pb2.TrainSpec(recipe_toml="#" * (256 * 1024 + 1)), "recipe", "larger than 256 KiB"),
        (jobs_pb2.TrainSpec(), "recipe", "either recipe_toml or recipe_name"),
        (jobs_pb2.TrainSpec(recipe_name="../../etc/passwd"), "recipe", "not a plain name"),
        (jobs_pb2.TrainSpec(recipe_name="secrets.toml"), "recipe", "send its text"),
        (convert_spec("digits@1", "onnx fp32"), "target", "is not allowed"),
        (convert_spec("../digits", "onnx-fp32"), "artifact", "not a plain name"),
        (convert_spec("{student}", "onnx-fp32"), "artifact", "only a pipeline has"),
        (convert_spec("digits", "onnx-fp32", -1.0), "tolerance", "is not allowed"),
        (evaluate_spec("digits", {"num_samples": 1}), "evaluate.num_samples", "is not allowed"),
        (pipeline_spec(), "pipeline.stages", "1 to 64 stages"),
        (
            pipeline_spec(stage("a", train_spec(recipe(steps=0)))),
            "pipeline.stages.a.steps",
            "stage a: steps = 0",
        ),
    ],
)
def test_a_bad_request_is_answered_with_the_field(client, work, field, said):
    before = len(client.list())
    with pytest.raises(ConfigError, match=said) as caught:
        client.submit(work)
    assert caught.value.field == field
    assert len(client.list()) == before


def test_a_conversion_that_cannot_succeed_is_refused_when_it_is_submitted(client, running, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    store = ArtifactStore(running.settings.store_url)
    wide = CondSpec(kind="prompt", max_tokens=77, embed_dim=2048, pooled_dim=1280)
    card = {"cond": wide.model_dump(mode="json")}
    store.publish(tmp_path, Manifest(name="wide", kind="denoiser", card=card))
    store.publish(tmp_path, Manifest(name="judge", kind="predictor"))
    before = len(client.list())
    for name, target, said in (
        ("wide", "trt-fp16", "an engine has one output; choose an onnx target"),
        ("judge", "onnx-fp32", "does not say what it takes"),
    ):
        with pytest.raises(ArtifactError, match=said):
            client.submit(convert_spec(name, target))
    assert len(client.list()) == before


def test_an_unknown_recipe_is_not_found(client):
    with pytest.raises(NotFound, match="no recipe is called 'dmd9'"):
        client.submit(train_spec("dmd9"))


def test_an_empty_request_and_unknown_numbers_are_refused(client, running):
    with grpc.insecure_channel(client.address) as channel:
        stub = jobs_pb2_grpc.JobsServiceStub(channel)
        for call, request in (
            (stub.Submit, jobs_pb2.SubmitRequest()),
            (stub.List, jobs_pb2.ListRequest(states=[77])),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for call in (client.get, client.cancel, client.retry, lambda job: list(client.watch(job))):
        with pytest.raises(NotFound):
            call("nobody")


def test_a_submitted_job_is_queued_with_what_was_asked(client):
    sent = client.submit(
        train_spec(recipe(), {"steps": 7, "config.guidance": 2.0, "title": "a title"}),
        name="my job",
        priority=3,
        labels={"team": "images"},
    )
    job = client.get(sent.id)
    assert (job.name, job.priority, dict(job.labels)) == ("my job", 3, {"team": "images"})
    assert (job.kind, job.state) == (jobs_pb2.JOB_KIND_TRAIN, jobs_pb2.JOB_STATE_QUEUED)
    for part in ('"steps": 7', '"guidance": 2.0', '"title": "a title"'):
        assert part in job.spec_json
    assert job.created_time.seconds > 1_700_000_000
    assert not job.HasField("finished_time")
    assert sent.id in [found.id for found in client.list(states=[jobs_pb2.JOB_STATE_QUEUED])]
    assert client.list(kinds=[jobs_pb2.JOB_KIND_CONVERT]) == []


def test_a_request_sent_twice_is_one_job(client):
    first = client.submit(train_spec(recipe()), idempotency_key="twice")
    assert client.submit(train_spec(recipe()), idempotency_key="twice").id == first.id
    with pytest.raises(ConfigError) as caught:
        client.submit(train_spec(recipe(steps=9)), idempotency_key="twice")
    assert caught.value.field == "idempotency_key"


def test_cancel_and_retry_say_what_is_not_possible(client):
    job = client.submit(train_spec(recipe()))
    assert client.cancel(job.id).state == jobs_pb2.JOB_STATE_CANCELLED
    assert client.cancel(job.id).state == jobs_pb2.JOB_STATE_CANCELLED
    assert client.retry(job.id).state == jobs_pb2.JOB_STATE_QUEUED
    with pytest.raises(ArtifactError, match="only one that FAILED or was CANCELLED"):
        client.retry(job.id)


def test_a_watcher_gets_everything_and_may_go_on_from_any_point(client, running, table):
    drain(table)
    job = client.submit(train_spec(recipe()))
    folder = running.settings.runs / job.id
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    (folder / "samples" / "00000002.png").write_bytes(PNG)
    (folder / "samples" / "00000009.png").write_bytes(PNG[:-4])  # still being written
    (folder / "log.txt").write_text("hello\nhalf a li")
    assert finish_next(table, artifact="digits@3", progress={"step": 2, "steps": 2}) == job.id

    news = list(client.watch(job.id, with_samples=True, with_log=True))
    kinds = [response.WhichOneof("event") for response in news]
    assert (kinds[0], kinds[-1]) == ("job", "job")
    assert news[-1].job.artifact == "digits@3"
    assert [n.change.what for n in news if n.HasField("change")] == ["submitted", "claimed", "succeeded"]
    assert [(n.metrics.step, n.metrics.values["loss"]) for n in news if n.HasField("metrics")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert [(n.sample.step, n.sample.data) for n in news if n.HasField("sample")] == [(2, PNG)]
    assert [n.log for n in news if n.HasField("log")] == ["hello\n"]

    after_first_line = next(n for n in news if n.HasField("metrics")).cursor
    again = list(client.watch(job.id, cursors={job.id: after_first_line}))
    assert [n.metrics.step for n in again if n.HasField("metrics")] == [2]
    assert not any(n.HasField("change") for n in again)
    assert [n.WhichOneof("event") for n in client.watch(job.id, only_new=True)] == ["job", "progress", "job"]


def test_watching_a_pipeline_tells_of_all_its_stages(client, table):
    drain(table)
    work = pipeline_spec(
        stage("student", train_spec(recipe(publish={"name": "digits"}))),
        stage("onnx", convert_spec("{student}", "onnx-fp32")),
        stage("check", evaluate_spec("{student}", {"num_samples": 10}), after=["onnx"]),
    )
    job = client.submit(work, name="all")
    assert [found.stage for found in job.stages] == ["student", "onnx", "check"]
    student, onnx, check = (found.id for found in job.stages)
    assert list(client.get(check).parents) == sorted([student, onnx])
    finish_next(table, verdict="failed", error={"type": "DivergedError", "message": "student diverged"})
    news = list(client.watch(job.id))
    assert {response.job_id for response in news} == {job.id, student, onnx, check}
    last = news[-1].job
    assert last.state == jobs_pb2.JOB_STATE_FAILED
    assert "stage student" in last.error.message
    assert client.wait(onnx).state == jobs_pb2.JOB_STATE_CANCELLED


def test_health_reflection_and_figures_are_served(client, running, table):
    with grpc.insecure_channel(client.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "distillery.v1.JobsService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    url = f"http://127.0.0.1:{running.settings.jobs_metrics_port}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    assert "distillery_job_table_up 1.0" in text
    assert 'distillery_jobs{kind="train",state="SUCCEEDED"}' in text
    assert 'distillery_jobs_requests_total{code="OK",method="Submit"}' in text


def test_a_port_in_use_is_one_sentence(client, running):
    second = running.start("-m", "distillery_trainer.server")
    assert second.wait() == 2
    last = running.log().splitlines()[-1]
    assert last.startswith("error: ")
    assert "in use" in last or "cannot be opened" in last


def test_no_server_is_one_sentence():
    with (
        JobsClient("127.0.0.1:1", timeout_s=5) as jobs,
        pytest.raises(DistilleryError, match="`distillery up` starts one"),
    ):
        jobs.list()


def test_a_wrong_setting_and_a_wrong_queue_are_one_sentence(monkeypatch, capsys):
    assert worker.main(["trian"]) == 2
    monkeypatch.setenv("DISTILLERY_LEASE_S", "soon")
    settings.cache_clear()
    assert server.main() == 2
    settings.cache_clear()
    queue_line, setting_line = capsys.readouterr().err.splitlines()
    assert "did you mean 'train'" in queue_line
    assert "DISTILLERY_LEASE_S = 'soon' is not allowed" in setting_line


def test_the_services_load_no_model_library():
    modules = "distillery_trainer.server, distillery_trainer.worker, distillery_trainer.client"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "False\n"

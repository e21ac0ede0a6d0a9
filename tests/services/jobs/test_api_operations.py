"""Sweeps, dry runs, filters, queues, garbage and tokens as a client and the command line see them: real servers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.errors import ConfigError, DataError, NotFound, Unavailable
from distill_service.jobs import queue
from distill_service.jobs.database import Database
from distill_service.jobs.queue import Outcome
from distill_service.settings import settings
from distill_service.status import StatusError
from distillery.v1 import jobs_pb2, jobs_pb2_grpc
from distillery_cli.app import main
from distillery_trainer.client import (
    JobsClient,
    convert_spec,
    evaluate_spec,
    pipeline_spec,
    stage,
    sweep_spec,
    train_spec,
)
from tests.services.jobs.jobs_child import PNG
from tests.services.jobs.jobs_stack import Processes, processes, recipe, short_settings, wait_for


def answers(jobs: JobsClient) -> bool:
    try:
        jobs.queues()
    except Unavailable:
        return False
    return True


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("jobs-operations")
    values = short_settings(folder / "state", broker_url=f"filesystem://{folder / 'broker'}")
    with processes(values) as started:
        started.server()
        yield started


@pytest.fixture(scope="module")
def client(running: Processes) -> Iterator[JobsClient]:
    with JobsClient(f"127.0.0.1:{running.settings.jobs_port}") as jobs:
        wait_for(lambda: answers(jobs), "the server to answer")
        yield jobs


@pytest.fixture(scope="module")
def table(running: Processes, client: JobsClient) -> Iterator[Database]:
    database = Database.open(running.settings.database_url)
    yield database
    database.close()


@pytest.fixture
def cli(client, running, monkeypatch, capsys):
    """Runs a command against the server: exit code, stdout, stderr."""
    monkeypatch.setenv("DISTILLERY_JOBS_PORT", str(running.settings.jobs_port))
    settings.cache_clear()

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    settings.cache_clear()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "small.toml"
    path.write_text('method = "dmd2"\nsteps = 3\n')
    return path


# -- sweeps


def test_a_sweep_is_queued_listed_and_compared(cli, client, table, recipe_file):
    arguments = [
        "-s",
        "optim.student.lr=1e-4,3e-4",
        "-s",
        "seed=1,2",
        "-s",
        "steps=5",
        "--label",
        "team=images",
    ]
    code, out, err = cli("submit", str(recipe_file), *arguments, "--json")
    assert code == 0, err
    jobs = json.loads(out)
    sweep = jobs[0]["id"]
    assert [(j["labels"]["optim.student.lr"], j["labels"]["seed"]) for j in jobs] == [
        ("1e-4", "1"),
        ("1e-4", "2"),
        ("3e-4", "1"),
        ("3e-4", "2"),
    ]
    assert {job["labels"]["sweep"] for job in jobs} == {sweep}
    assert json.loads(client.get(jobs[2]["id"]).spec_json)["recipe"]["steps"] == 5
    for figure in (0.5, 0.25):
        claim = queue.claim(table, ["train"], worker="w", lease_s=60)
        queue.finish(table, claim.id, claim.attempt, Outcome("succeeded", metrics={"fd": figure}))
    code, out, _ = cli("compare", sweep, "--by", "fd", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["metrics"].get("fd"), row["state"]) for row in rows[:3]] == [
        (0.25, "SUCCEEDED"),
        (0.5, "SUCCEEDED"),
        (None, "QUEUED"),
    ]
    code, out, _ = cli("compare", "team=images")
    assert code == 0
    header = out.splitlines()[0].split()
    assert header == ["id", "optim.student.lr", "seed", "state", "fd"]  # what all have in common is left out
    code, out, _ = cli(
        "jobs", "--label", f"sweep={sweep}", "--label", "seed=2", "--state", "queued", "--json"
    )
    assert [job["id"] for job in json.loads(out)] == [jobs[3]["id"]]
    for job in jobs:
        if client.get(job["id"]).state == jobs_pb2.JOB_STATE_QUEUED:
            client.cancel(job["id"])


def test_a_sweep_sent_again_is_the_same_and_a_wrong_one_queues_nothing(client):
    work = sweep_spec(train_spec(recipe()), {"seed": ["5", "6"]})
    first = client.sweep(work, idempotency_key="sweep")
    assert [job.id for job in client.sweep(work, idempotency_key="sweep")] == [job.id for job in first]
    count = len(client.list(limit=500))
    for axes, said in (
        ({"seed": ["1", "x"]}, "in the sweep's job seed=x"),
        ({}, "1 to 8 keys"),
        ({"k" * 70: ["1", "2"]}, "unknown key|label"),
        ({"seed": [str(n) for n in range(300)]}, "at most 256"),
    ):
        with pytest.raises(ConfigError, match=said):
            client.sweep(sweep_spec(train_spec(recipe()), axes))
    with pytest.raises(ConfigError, match="either recipe_toml or recipe_name"):
        client.sweep(sweep_spec(jobs_pb2.TrainSpec(), {"seed": ["1", "2"]}))
    assert len(client.list(limit=500)) == count
    for job in first:
        client.cancel(job.id)


# -- dry runs


def test_a_dry_run_looks_at_memory_and_queues_nothing(client, running):
    before = len(client.list(limit=500))
    work = pipeline_spec(
        stage("judge", train_spec("judge_digits", {"steps": 2, "publish": {"name": "judge"}})),
        stage("onnx", convert_spec("{judge}", "onnx-fp32")),
    )
    judge, onnx = client.dry_run(work, labels={"team": "a"})
    assert (judge.name, judge.kind, judge.fits) == ("judge", jobs_pb2.JOB_KIND_TRAIN, True)
    assert 10_000 < judge.standing_bytes < judge.memory_bytes < judge.device_bytes
    assert judge.device
    assert (onnx.name, onnx.memory_bytes) == ("onnx", 0)
    assert "needs what judge will publish" in onnx.note
    assert len(client.list(limit=500)) == before
    assert not (running.settings.state_dir / "store").exists() or not any(
        running.settings.runs.glob("judge*")
    )


def test_a_dry_run_finds_data_and_models_that_are_not_there(client, cli):
    for work, kind, said in (
        (train_spec("judge_cifar10"), DataError, "does not exist"),
        (pipeline_spec(stage("x", evaluate_spec("nobody@1"))), NotFound, "no model is called 'nobody'"),
    ):
        with pytest.raises(kind, match=said) as caught:
            client.dry_run(work)
        assert "\n" not in str(caught.value)
    code, out, err = cli("submit", "judge_digits", "--dry-run", "-s", "stepz=3")
    assert (code, out) == (2, "")
    assert "did you mean 'steps'" in err


def test_a_dry_run_refuses_at_once_what_submit_refuses(client):
    with pytest.raises(ConfigError, match="labels given") as caught:
        client.dry_run(train_spec(recipe()), labels={str(n): "" for n in range(40)})
    assert caught.value.field == "labels"
    with pytest.raises(ConfigError, match="only a pipeline has"):
        client.dry_run(convert_spec("{x}", "onnx-fp32"))


# -- lists and watches


def test_lists_are_filtered_by_time_and_pages_go_on(client):
    began = datetime.now(UTC) - timedelta(seconds=1)
    ids = [client.submit(train_spec(recipe()), labels={"batch": "paged"}).id for _ in range(5)]
    pages = list(client.pages(labels={"batch": "paged"}, page_size=2))
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [job.id for page in pages for job in page] == ids[::-1]
    assert client.list(labels={"batch": "paged"}, created_before=began) == []
    assert len(client.list(labels={"batch": "paged"}, created_after=began, limit=3)) == 3
    for job in ids:
        client.cancel(job)


def test_pictures_are_saved_and_a_watch_goes_on_from_a_cursor(cli, client, running, tmp_path):
    job = client.submit(train_spec(recipe()))
    samples = running.settings.runs / job.id / "samples"
    samples.mkdir(parents=True)
    (samples / "00000001.png").write_bytes(PNG)
    client.cancel(job.id)
    code, out, _ = cli("watch", job.id, "--samples", str(tmp_path / "pictures"), "--json")
    assert code == 143
    assert (tmp_path / "pictures" / f"{job.id}-00000001.png").read_bytes() == PNG
    told = [json.loads(line) for line in out.splitlines()]
    cursor = next(line["cursor"] for line in told if "sample" in line)
    code, out, _ = cli("watch", job.id, "--from", json.dumps(cursor), "--json")
    again = [json.loads(line) for line in out.splitlines()]
    assert not any("sample" in line or "change" in line for line in again)
    for wrong in ("12", '{"evnt": 1}', '{"event": -1e99}', "{"):
        code, _, err = cli("watch", job.id, "--from", wrong)
        assert code == 2
        assert "cursor" in err.splitlines()[-1]


# -- queues


def test_queues_are_paused_and_resumed(cli, client, table):
    code, out, _ = cli("pause", "train", "--reason", "driver update", "--json")
    assert code == 0
    assert (json.loads(out)[0]["paused"], json.loads(out)[0]["reason"]) == (True, "driver update")
    job = client.submit(train_spec(recipe()))
    assert queue.claim(table, ["train"], worker="w", lease_s=60) is None
    assert "driver update" in cli("queues")[1]
    code, out, _ = cli("resume", "train", "--json")
    assert not json.loads(out)[0]["paused"]
    assert queue.waiting(table, ["train"])
    client.cancel(job.id)
    code, _, err = cli("pause", "trian")
    assert code == 67
    assert "did you mean 'train'" in err


# -- garbage


def test_garbage_is_shown_and_removed(cli, client, running, table, tmp_path):
    store = ArtifactStore(running.settings.store_url)
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 100)
    for _ in range(3):
        store.publish(tmp_path, Manifest(name="digits", kind="denoiser"))
    code, out, _ = cli("gc", "--keep", "1", "--older-than", "0s", "--dry-run", "--json")
    assert code == 0
    models = [thing["name"] for thing in json.loads(out)["garbage"] if thing["kind"] == "model"]
    assert models == ["digits@1", "digits@2"]
    assert store.versions("digits") == [1, 2, 3]
    assert cli("gc")[1].splitlines()[-1].startswith("0 removed")  # all of it is young
    code, out, _ = cli("gc", "--keep", "1", "--older-than", "0s")
    assert code == 0
    assert "digits@2" in out
    assert store.versions("digits") == [3]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gc", "--keep", "0"], 2, "keep"),
        (["gc", "--older-than", "soon"], 2, "is not an age such as"),
        (["jobs", "--label", "x"], 2, "is not KEY=VALUE"),
        (["jobs", "--label", "a b=x"], 2, "a key has 1 to 64 letters"),
        (["jobs", "--since", "yesterday"], 2, "neither an age"),
        (["jobs", "--since", "1d", "--until", "2d"], 2, "not earlier than created_before"),
        (["compare", "nobody"], 67, "no job has the label 'nobody'"),
        (["submit", "dmd2", "-s", "seed=1,2", "--watch"], 2, "--watch follows one job"),
        (["submit", "dmd2", "--sweep", "title=a cat, on a mat"], 2, "in quotes"),
        (["submit", "dmd2", "--label", "team"], 2, "is not KEY=VALUE"),
        (["submit", "dmd2", "--label", "sweep=x"], 2, "given to sweeps only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence_with_its_exit_code(cli, arguments, code, said):
    given, out, err = cli(*arguments)
    assert (given, out) == (code, "")
    assert said in err
    assert err.rstrip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_requests_out_of_bounds_are_invalid_arguments(client):
    with grpc.insecure_channel(client.address) as channel:
        stub = jobs_pb2_grpc.JobsServiceStub(channel)
        for call, request, code in (
            (stub.List, jobs_pb2.ListRequest(page_token="%%%"), "INVALID_ARGUMENT"),
            (stub.List, jobs_pb2.ListRequest(page_size=501), "INVALID_ARGUMENT"),
            (stub.List, jobs_pb2.ListRequest(labels={"": ""}), "INVALID_ARGUMENT"),
            (stub.PauseQueue, jobs_pb2.PauseQueueRequest(), "NOT_FOUND"),
            (stub.ResumeQueue, jobs_pb2.ResumeQueueRequest(name="\0"), "NOT_FOUND"),
            (stub.CollectGarbage, jobs_pb2.CollectGarbageRequest(keep=0), "INVALID_ARGUMENT"),
            (
                stub.CollectGarbage,
                jobs_pb2.CollectGarbageRequest(older_than_seconds=float("nan")),
                "INVALID_ARGUMENT",
            ),
            (stub.Submit, jobs_pb2.SubmitRequest(sweep=jobs_pb2.SweepSpec()), "INVALID_ARGUMENT"),
            (stub.Submit, jobs_pb2.SubmitRequest(dry_run=True), "INVALID_ARGUMENT"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request)
            assert caught.value.code().name == code, request
            assert "\n" not in caught.value.details()


# -- tokens and TLS


def test_tokens_and_tls_guard_the_jobs_and_name_their_owner(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate to test with")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    lines = [
        f"{name}:{hashlib.sha256(token).hexdigest()}:{scope}\n"
        for name, token, scope in (("ann", b"open sesame", "admin"), ("reader", b"look", "use"))
    ]
    (tmp_path / "tokens").write_text("".join(lines))
    values = short_settings(
        tmp_path / "state",
        broker_url=f"filesystem://{tmp_path / 'broker'}",
        tls_cert=tmp_path / "cert.pem",
        tls_key=tmp_path / "key.pem",
        tokens_file=tmp_path / "tokens",
    )
    with processes(values) as started:
        started.server()
        address, ca = f"127.0.0.1:{values.jobs_port}", tmp_path / "cert.pem"
        with (
            JobsClient(address, token="open sesame", ca=ca) as admin,
            JobsClient(address, token="look", ca=ca) as reader,
            JobsClient(address, token="guess", ca=ca) as stranger,
            JobsClient(address, ca=ca) as nobody,
            JobsClient(address, timeout_s=5) as plain,
        ):
            wait_for(lambda: answers(admin), "the server to answer")
            job = admin.submit(train_spec(recipe()))
            assert (job.owner, admin.get(job.id).owner) == ("ann", "ann")
            assert reader.get(job.id).id == job.id
            assert [found.id for found in reader.list()] == [job.id]
            assert "train" in [found.name for found in reader.queues()]
            assert next(iter(reader.watch(job.id))).job.id == job.id
            for call in (
                lambda: reader.submit(train_spec(recipe())),
                lambda: reader.dry_run(train_spec(recipe())),
                lambda: reader.cancel(job.id),
                lambda: reader.retry(job.id),
                lambda: reader.pause("train"),
                lambda: reader.resume("train"),
                lambda: reader.collect_garbage(),
            ):
                with pytest.raises(StatusError, match="scope admin") as caught:
                    call()
                assert caught.value.grpc_status == "PERMISSION_DENIED"
            for caller, said in ((stranger, "not known"), (nobody, "is needed")):
                with pytest.raises(StatusError, match=said) as caught:
                    caller.queues()
                assert caught.value.grpc_status == "UNAUTHENTICATED"
            with pytest.raises(Unavailable):
                plain.queues()
            assert admin.pause("train").who == "ann"

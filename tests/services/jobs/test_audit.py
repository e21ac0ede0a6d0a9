"""Each admin call leaves one line, whoever made it and however it ended, and no secret in it."""

import asyncio
import hashlib
import json
import logging

import grpc
import pytest
import structlog
from tritonclient.grpc import InferenceServerClient

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError
from distill_service.audit import AuditLog
from distill_service.channels import channel
from distill_service.logs import configure_logging
from distill_service.rpc import RpcSettings, bind, build_server
from distill_service.settings import load_settings
from distillery.v1 import jobs_pb2, jobs_pb2_grpc, models_pb2, models_pb2_grpc
from distillery_sampler.client import SamplerClient
from distillery_sampler.kserve.servicer import ADMIN_METHODS as KSERVE_ADMIN
from distillery_sampler.v1.servicer import ADMIN_METHODS as MODELS_ADMIN
from distillery_trainer.server import ADMIN_METHODS as JOBS_ADMIN
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.stack.test_rpc import SERVICE, running

ADMIN = frozenset({f"/{SERVICE}/LoadModel"})


@pytest.fixture
def tokens_file(tmp_path):
    file = tmp_path / "tokens"
    lines = [f"{n}:{hashlib.sha256(f'secret-{n}'.encode()).hexdigest()}:{n}" for n in ("use", "admin")]
    file.write_text("\n".join(lines))
    return file


async def load(address: str, model: str, token: str | None) -> str:
    """The status of a LoadModel."""
    async with channel(address, token=token, retries=0, aio=True) as plain:
        stub = models_pb2_grpc.ModelsServiceStub(plain)
        try:
            await stub.LoadModel(models_pb2.LoadModelRequest(model=model))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        await stub.GetModel(models_pb2.GetModelRequest(model=model))  # no admin call: no line
        return "OK"


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_done_and_refused_admin_calls_are_appended_with_who_and_what(tokens_file, tmp_path):
    file = tmp_path / "audit.jsonl"
    settings = RpcSettings(tokens_file=tokens_file, audit_log=file)

    async def run() -> None:
        async with running(settings, admin_methods=ADMIN) as address:
            assert await load(address, "digits@2", "secret-admin") == "OK"
            assert await load(address, "mine", "secret-use") == "PERMISSION_DENIED"
            assert await load(address, "x" * 500, "guessed") == "UNAUTHENTICATED"

    asyncio.run(run())
    lines = lines_of(file)
    assert [(line["who"], line["target"], line["outcome"]) for line in lines] == [
        ("admin", "digits@2", "OK"),
        ("use", "mine", "PERMISSION_DENIED"),
        ("ipv4:127.0.0.1", "x" * 200, "UNAUTHENTICATED"),
    ]
    assert {line["method"] for line in lines} == {f"{SERVICE}/LoadModel"}
    assert len({line["request_id"] for line in lines}) == 3
    assert "secret" not in file.read_text()
    assert "guessed" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    asyncio.run(run())
    assert len(lines_of(file)) == 6  # a restart appends


@pytest.fixture
def logged(caplog):
    """The log's lines so far, where it keeps only warnings."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    configure_logging("test", load_settings(log_level="warning", log_format="json"))
    root.handlers[:] = before[0]
    yield lambda: [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    root.setLevel(before[1])
    structlog.reset_defaults()


def test_without_a_file_the_log_has_the_line_even_where_it_keeps_only_warnings(logged):
    async def run() -> None:
        async with running(RpcSettings(), admin_methods=ADMIN) as address:
            await load(address, "digits", None)

    asyncio.run(run())
    (line,) = logged()
    wanted = {"event": "audit", "who": "ipv4:127.0.0.1", "target": "digits", "outcome": "OK"}
    assert wanted.items() <= line.items()
    assert line["request_id"]


def test_a_file_that_cannot_be_written_is_refused_at_the_start_and_logged_later(tmp_path, logged):
    with pytest.raises(ConfigError, match="cannot be written.*DISTILLERY_AUDIT_LOG"):
        AuditLog(tmp_path / "none" / "audit.jsonl")
    folder = tmp_path / "there"
    folder.mkdir()
    audit = AuditLog(folder / "audit.jsonl")
    (folder / "audit.jsonl").unlink()
    folder.rmdir()
    audit.record(who="me", method="/a/B", target="t", outcome="OK", request_id="1")
    assert [line["event"] for line in logged()] == ["audit", "audit log cannot be written"]


def test_the_samplers_admin_calls_of_both_protocols_are_recorded(tmp_path):
    store_url = str(tmp_path / "store")
    publish_denoiser(ArtifactStore(store_url), tmp_path / "model")
    file = tmp_path / "audit.jsonl"
    with SamplerProcess(store_url, {"DISTILLERY_AUDIT_LOG": str(file)}) as sampler:
        with SamplerClient(sampler.address) as client, InferenceServerClient(sampler.address) as triton:
            client.load("digits")
            client.unload("digits@1")
            triton.load_model("digits")
            triton.unload_model("digits")
        assert sampler.stop() == 0
    called = [(line["method"], line["target"], line["outcome"]) for line in lines_of(file)]
    assert called == [
        ("distillery.v1.ModelsService/LoadModel", "digits", "OK"),
        ("distillery.v1.ModelsService/UnloadModel", "digits@1", "OK"),
        ("inference.GRPCInferenceService/RepositoryModelLoad", "digits", "OK"),
        ("inference.GRPCInferenceService/RepositoryModelUnload", "digits", "OK"),
    ]
    assert {line for line, _, _ in called} == {name.lstrip("/") for name in KSERVE_ADMIN | MODELS_ADMIN}


def test_the_jobs_apis_admin_calls_are_recorded_by_id_or_name_and_without_their_recipe(tmp_path):
    class Servicer(jobs_pb2_grpc.JobsServiceServicer):
        async def Submit(self, request, context):
            return jobs_pb2.SubmitResponse()

        async def Cancel(self, request, context):
            return jobs_pb2.CancelResponse()

        Retry = Cancel

    async def run() -> None:
        settings = RpcSettings(audit_log=tmp_path / "audit.jsonl")
        server = build_server(settings, admin_methods=JOBS_ADMIN)
        jobs_pb2_grpc.add_JobsServiceServicer_to_server(Servicer(), server)
        port = bind(server, settings)
        await server.start()
        async with channel(f"127.0.0.1:{port}", aio=True) as plain:
            stub = jobs_pb2_grpc.JobsServiceStub(plain)
            train = jobs_pb2.TrainSpec(recipe_toml='key = "s3cret"')
            await stub.Submit(jobs_pb2.SubmitRequest(name="nightly", train=train))
            await stub.Cancel(jobs_pb2.CancelRequest(id="job-1"))
        await server.stop(0)

    asyncio.run(run())
    assert [line["target"] for line in lines_of(tmp_path / "audit.jsonl")] == ["nightly", "job-1"]
    assert "s3cret" not in (tmp_path / "audit.jsonl").read_text()

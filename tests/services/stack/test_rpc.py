"""What every service's server does around its servicer, over loopback."""

import asyncio
import hashlib
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from distill_core.config import check_name
from distill_core.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DistilleryError,
    DivergedError,
    NotFound,
    Overloaded,
    Unavailable,
)
from distill_service.auth import CALLER, Tokens
from distill_service.rpc import (
    RpcSettings,
    Shed,
    add_health_and_reflection,
    bind,
    build_server,
    channel,
    run_until_stopped,
)
from distill_service.status import StatusError, error_from_call
from distillery.v1 import models_pb2, models_pb2_grpc

SERVICE = "distillery.v1.ModelsService"
ERRORS = {
    "config": ConfigError("steps = -1 is not allowed", field="steps"),
    "picture": DataError("picture a.png is damaged", field="data.path"),
    "diverged": DivergedError("the loss is not finite"),
    "missing": NotFound("no model is called 'x'", field="model"),
    "damaged": ArtifactError("checksum differs"),
    "away": Unavailable("the database is not there"),
    "busy": Overloaded("the queue is full", retry_after_s=1.5),
    "denied": StatusError("PERMISSION_DENIED", "not yours"),
}


class Servicer(models_pb2_grpc.ModelsServiceServicer):
    """Raises what it is asked for."""

    async def GetModel(self, request, context):
        if request.model in ERRORS:
            raise ERRORS[request.model]
        if request.model == "bug":
            raise KeyError("a secret of the server's")
        return models_pb2.GetModelResponse(model=models_pb2.Model(name=CALLER.get().name))

    async def LoadModel(self, request, context):
        return models_pb2.LoadModelResponse()

    async def WatchModels(self, request, context):
        yield models_pb2.WatchModelsResponse()
        raise ERRORS["missing"]


@asynccontextmanager
async def running(settings: RpcSettings, **options):
    server = build_server(settings, **options)
    models_pb2_grpc.add_ModelsServiceServicer_to_server(Servicer(), server)
    health = add_health_and_reflection(server, [SERVICE])
    started, stop = asyncio.Queue(), asyncio.Event()
    serving = asyncio.create_task(
        run_until_stopped(server, settings, health, on_started=started.put, stop=stop, grace_s=1)
    )
    try:
        yield f"127.0.0.1:{await asyncio.wait_for(started.get(), 60)}"
    finally:
        stop.set()
        await serving


async def error_of(address: str, model: str, **options) -> tuple[DistilleryError, grpc.aio.AioRpcError]:
    async with grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)]) as plain:
        stub = models_pb2_grpc.ModelsServiceStub(plain)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetModel(models_pb2.GetModelRequest(model=model), **options)
        return error_from_call(caught.value, address), caught.value


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_arrives_as_it_was_raised(name):
    async def run() -> None:
        async with running(RpcSettings()) as address:
            error, call = await error_of(address, name)
        raised = ERRORS[name]
        assert type(error) is type(raised)
        assert str(error) == str(raised)
        if name in ("config", "missing"):
            assert error.field == raised.field
        if name == "busy":
            assert error.retry_after_s == 1.5
            assert ("grpc-retry-pushback-ms", "1500") in list(call.trailing_metadata())

    asyncio.run(run())


@pytest.mark.parametrize("method", ["GetModel", "WatchModels"])
def test_what_is_shed_is_refused_before_its_message_arrives(method):
    left, calls = [], []

    def too_late(seconds_left: float) -> DistilleryError:
        left.append(seconds_left)
        return ERRORS["busy"]

    async def nothing():
        await asyncio.sleep(60)
        yield b""

    async def run() -> None:
        async with (
            running(
                RpcSettings(),
                shed=Shed(frozenset({f"/{SERVICE}/{method}"}), too_late),
                on_call=lambda *call: calls.append(call),
            ) as address,
            grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)]) as plain,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await plain.stream_unary(f"/{SERVICE}/{method}")(nothing(), timeout=240)
            assert error_from_call(caught.value).retry_after_s == 1.5
            await models_pb2_grpc.ModelsServiceStub(plain).LoadModel(
                models_pb2.LoadModelRequest(), timeout=240
            )

    asyncio.run(run())
    assert 0 < left[0] <= 240
    assert len(left) == 1  # and is not asked of other methods
    assert [call[:2] for call in calls] == [
        (f"/{SERVICE}/{method}", "RESOURCE_EXHAUSTED"),
        (f"/{SERVICE}/LoadModel", "OK"),
    ]


def test_a_bug_is_answered_with_a_request_id_and_nothing_of_the_inside():
    async def run() -> None:
        async with running(RpcSettings()) as address:
            error, call = await error_of(address, "bug")
        assert call.code() is grpc.StatusCode.INTERNAL
        assert "request id" in str(error)
        assert "secret" not in str(error)

    asyncio.run(run())


def test_a_stream_that_breaks_says_why_after_what_it_sent():
    async def run() -> None:
        calls = []
        async with running(RpcSettings(), on_call=lambda *call: calls.append(call[:2])) as address:
            async with channel(address, aio=True) as plain:
                stream = models_pb2_grpc.ModelsServiceStub(plain).WatchModels(models_pb2.WatchModelsRequest())
                assert await stream.read() == models_pb2.WatchModelsResponse()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stream.read()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert calls == [(f"/{SERVICE}/WatchModels", "NOT_FOUND")]

    asyncio.run(run())


@pytest.fixture
def tokens_file(tmp_path):
    file = tmp_path / "tokens"
    lines = [f"{name}:{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in ("use", "admin")]
    file.write_text("# name:sha256:scope\n" + "\n".join(lines) + "\n")
    return file


def test_tokens_guard_every_call_but_health(tokens_file):
    async def run() -> None:
        admin = frozenset({f"/{SERVICE}/LoadModel"})
        async with running(RpcSettings(tokens_file=tokens_file), admin_methods=admin) as address:
            for wrong in (None, "guess"):
                async with channel(address, token=wrong, aio=True) as plain:
                    stub = models_pb2_grpc.ModelsServiceStub(plain)
                    with pytest.raises(grpc.aio.AioRpcError) as unary:
                        await stub.GetModel(models_pb2.GetModelRequest())
                    with pytest.raises(grpc.aio.AioRpcError) as stream:
                        await stub.WatchModels(models_pb2.WatchModelsRequest()).read()
                    assert unary.value.code() is stream.value.code() is grpc.StatusCode.UNAUTHENTICATED
                    health = health_pb2_grpc.HealthStub(plain)
                    reply = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
                    assert reply.status == health_pb2.HealthCheckResponse.SERVING
            async with channel(address, token="use", aio=True) as plain:
                stub = models_pb2_grpc.ModelsServiceStub(plain)
                assert (await stub.GetModel(models_pb2.GetModelRequest())).model.name == "use"
                assert await stub.WatchModels(models_pb2.WatchModelsRequest()).read() is not None
                with pytest.raises(grpc.aio.AioRpcError, match="scope admin"):
                    await stub.LoadModel(models_pb2.LoadModelRequest(), timeout=240)
            async with channel(address, token="admin", aio=True) as plain:
                await models_pb2_grpc.ModelsServiceStub(plain).LoadModel(
                    models_pb2.LoadModelRequest(), timeout=240
                )

    asyncio.run(run())


def test_who_shows_no_token_is_not_told_how_long_the_queue_is(tokens_file):
    async def run() -> None:
        settings = RpcSettings(tokens_file=tokens_file)
        busy = Shed(frozenset({f"/{SERVICE}/GetModel"}), lambda _left: ERRORS["busy"])
        async with running(settings, shed=busy) as address:
            for token, wanted in (
                (None, "UNAUTHENTICATED"),
                ("guess", "UNAUTHENTICATED"),
                ("use", "RESOURCE_EXHAUSTED"),
            ):
                metadata = [("authorization", f"Bearer {token}")] if token else None
                _, call = await error_of(address, "any", metadata=metadata, timeout=240)
                assert call.code().name == wanted

    asyncio.run(run())


def test_health_says_not_serving_until_told_otherwise():
    async def run() -> None:
        server = build_server(RpcSettings())
        health = add_health_and_reflection(server, [SERVICE])
        port = bind(server, RpcSettings())
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
            stub = health_pb2_grpc.HealthStub(plain)
            for serving in (False, True):
                await health.report(serving) if serving else None
                for service in ("", SERVICE):
                    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                    assert (reply.status == health_pb2.HealthCheckResponse.SERVING) is serving
        await server.stop(0)

    asyncio.run(run())


def test_reflection_lists_and_describes_the_services():
    async def run() -> None:
        async with running(RpcSettings()) as address:

            def reflect() -> None:
                with grpc.insecure_channel(address) as plain:
                    database = ProtoReflectionDescriptorDatabase(plain)
                    assert SERVICE in database.get_services()
                    described = database.FindFileContainingSymbol(SERVICE)
                    assert described.name == "distillery/v1/models.proto"

            await asyncio.to_thread(reflect)

    asyncio.run(run())


def test_a_port_in_use_is_one_sentence():
    async def run() -> None:
        async with running(RpcSettings()) as address:
            taken = RpcSettings(port=int(address.rsplit(":", 1)[1]))
            with pytest.raises(ConfigError, match="port is in use.*choose another") as error:
                bind(build_server(taken), taken)
            assert error.value.field == "port"

    asyncio.run(run())


def test_a_server_that_is_not_there_is_unavailable():
    with channel("127.0.0.1:1") as plain, pytest.raises(grpc.RpcError) as caught:
        models_pb2_grpc.ModelsServiceStub(plain).GetModel(models_pb2.GetModelRequest(), timeout=2)
    error = error_from_call(caught.value, "127.0.0.1:1")
    assert isinstance(error, Unavailable)
    assert "no server answers at 127.0.0.1:1" in str(error)


def test_a_token_never_travels_unencrypted(tokens_file):
    with pytest.raises(ConfigError, match="unencrypted"):
        RpcSettings.parse({"host": "0.0.0.0", "tokens_file": tokens_file})
    with pytest.raises(ConfigError, match="unencrypted"):
        channel("example.org:50051", token="secret")


def test_a_bad_tokens_file_is_refused_without_showing_it(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("me:my-plain-secret:use\n")
    with pytest.raises(ConfigError, match="line 1") as error:
        Tokens.read(file)
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.read(tmp_path / "none")


def test_names_that_leave_their_folder_are_refused():
    with pytest.raises(ConfigError, match="plain name"):
        check_name("../x", what="model", field="model")

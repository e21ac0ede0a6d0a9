"""Servers on every kind of address are reached by our clients and commands, and never through a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import fsspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distill_core.errors import DistilleryError
from distill_service.addresses import is_local, joined
from distill_service.channels import channel
from distill_service.rpc import RpcSettings, add_health_and_reflection, bind, build_server
from distill_service.settings import settings
from distillery_cli.app import main
from distillery_cli.models.generate import client
from distillery_sampler.client import AsyncSamplerClient
from distillery_trainer.client import JobsClient

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


@contextlib.contextmanager
def served(host: str) -> Iterator[str]:
    """The address of a server of ours that answers health checks alone."""
    started: list[str] = []
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        known = RpcSettings(host=host)
        server = build_server(known)
        health = add_health_and_reflection(server, ["distillery.v1.SamplerService"])
        started.append(joined(host, bind(server, known)))
        await server.start()
        await health.report(True)
        ready.set()
        await stop.wait()
        await server.stop(1)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait()
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)


class Proxy(threading.Thread):
    """A listener that keeps whatever is sent to it and hangs up."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.heard: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    self.heard.append(connection.recv(4096))

    def local(self) -> list[bytes]:
        """What was meant for this machine; libraries may have calls of their own to others."""
        targets = [said.split()[1].decode().removeprefix("http://").partition("/")[0] for said in self.heard]
        return [said for said, target in zip(self.heard, targets) if is_local(target)]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch) -> Iterator[Proxy]:
    """Every variable that libraries take a proxy from leads to one, and none says where not to use it."""
    proxy = Proxy()
    for name in PROXIES:
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.upper(), proxy.url)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")
    settings.cache_clear()
    yield proxy
    proxy.close()
    settings.cache_clear()


@pytest.fixture(params=["127.0.0.1", "::1", "localhost", "unix"])
def address(request, tmp_path) -> Iterator[str]:
    with served(f"unix:{tmp_path / 's.sock'}" if request.param == "unix" else request.param) as where:
        yield where


def named(address: str, monkeypatch) -> None:
    """Let the settings name the server as both."""
    host, _, port = address.rpartition(":")
    for name in ("SAMPLER", "JOBS"):
        monkeypatch.setenv(f"DISTILLERY_{name}_HOST", address if address.startswith("unix:") else host)
        if not address.startswith("unix:"):
            monkeypatch.setenv(f"DISTILLERY_{name}_PORT", port)
    monkeypatch.setenv("DISTILLERY_TOKEN", "a-secret-of-the-user")
    settings.cache_clear()


def test_clients_and_commands_reach_a_server_of_this_machine_past_every_proxy(
    address, proxy, monkeypatch, tmp_path, capsys
):
    named(address, monkeypatch)
    monkeypatch.setenv("DISTILLERY_STATE_DIR", str(tmp_path / "state"))
    with client() as sampler:
        sampler.wait_ready(10)
    with JobsClient() as jobs, pytest.raises(DistilleryError) as refused:
        jobs.get("a" * 12)
    assert "no server answers" not in str(refused.value)
    assert main(["health", "grpc", address]) == 0
    capsys.readouterr()
    main(["doctor", "--json"])
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    for name in ("sampler", "jobs api"):
        assert (found[name]["state"], found[name]["said"]) == ("ok", f"{address} SERVING")
    assert proxy.local() == []


def test_the_asyncio_client_passes_no_proxy_either(address, proxy):
    async def ask() -> None:
        async with AsyncSamplerClient(address, token="a-secret-of-the-user") as sampler:
            await sampler.wait_ready(10)

    asyncio.run(ask())
    assert proxy.local() == []


def test_calls_to_other_machines_still_use_the_proxy(proxy):
    with channel("sampler.example.org:50052", retries=0) as connection, contextlib.suppress(Exception):
        health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(), timeout=3)
    assert proxy.heard[0].startswith(b"CONNECT sampler.example.org:50052 ")


def test_a_store_on_this_machine_is_read_past_every_proxy(proxy, monkeypatch, tmp_path):
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    moto = pytest.importorskip("moto.server", reason="the extra dev (moto) is not installed")
    from distill_core.artifacts import ArtifactStore

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"AWS_{name}", "test")
        settings()
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("direct")
        assert ArtifactStore("s3://direct/here").names() == []
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()
    assert proxy.local() == []

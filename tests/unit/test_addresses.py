"""Hosts, ports and sockets: joined, parted and judged in one place."""

from __future__ import annotations

import socket

import pytest

from distill_core.errors import ConfigError
from distill_service.addresses import checked, dialled, grpc_options, is_local, joined, listens, without_proxy
from distill_service.rpc import RpcSettings, channel
from distill_service.settings import load_settings

DIRECT = [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:50052"),
        ("sampler", "sampler:50052"),
        ("::1", "[::1]:50052"),
        ("[::1]", "[::1]:50052"),
        ("2001:db8::7", "[2001:db8::7]:50052"),
        ("unix:/run/s.sock", "unix:/run/s.sock"),
        ("unix-abstract:s", "unix-abstract:s"),
    ],
)
def test_server_and_callers_join_host_and_port_alike(host, address, monkeypatch):
    monkeypatch.setenv("DISTILLERY_SAMPLER_HOST", host)
    monkeypatch.setenv("DISTILLERY_JOBS_HOST", host)
    known = load_settings(sampler_port=50052, jobs_port=50052)
    assert known.sampler_address == known.jobs_address == address
    assert RpcSettings(host=known.sampler_host, port=50052).address == address
    assert checked(address) == address


def test_a_server_that_listens_to_all_is_called_on_the_loopback():
    assert joined("::", 7) == "[::]:7"
    assert dialled("::", 7) == "[::1]:7"
    assert dialled("0.0.0.0", 7) == "127.0.0.1:7"


@pytest.mark.parametrize(
    "host",
    ["localhost:50052", "http://sampler", "", "a b", "[sampler]", "[::1", "1::2::3", "user@sampler", "a/b"],
)
def test_a_host_that_is_none_is_refused_and_its_setting_named(host):
    with pytest.raises(ConfigError, match="is no host"):
        joined(host, 50052)
    with pytest.raises(ConfigError, match="DISTILLERY_JOBS_HOST"):
        load_settings(jobs_host=host)
    with pytest.raises(ConfigError, match="is no host"):
        RpcSettings(host=host)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("sampler", "write sampler:PORT"),
        ("::1", r"write \[::1\]:PORT"),
        ("::1:50052", r"write \[::1\]:PORT"),
        ("[::1]", "no port from 1 to 65535"),
        ("127.0.0.1", "write 127.0.0.1:PORT"),
        ("http://sampler:50052", "without http://"),
        ("sampler:0", "no port from 1 to 65535"),
        ("sampler:65536", "no port from 1 to 65535"),
        ("sampler:-1", "no port from 1 to 65535"),
        ("sampler:50052x", "no port from 1 to 65535"),
        (":50052", "write HOST:PORT"),
        ("a:b:50052", "write HOST:PORT"),
        ("", "write HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_refused_with_how_it_is_written(address, said):
    with pytest.raises(ConfigError, match=said) as caught:
        channel(address)
    assert caught.value.field == "address"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:5", "127.8.9.10:5", "[::1]:5", "[::ffff:127.0.0.1]:5", "localhost:5", "LocalHost.:5",
        "a.localhost:5", "unix:/tmp/s", "unix:///tmp/s", "unix-abstract:s", "dns:///localhost:5", "ipv6:[::1]:5",
    ],
)  # fmt: skip
def test_what_stays_on_this_machine_takes_a_token_and_no_proxy(address):
    assert is_local(address)
    assert grpc_options(address) == DIRECT
    channel(address, token="secret").close()


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.7:5",
        "127.0.0.1.example.org:5",
        "127.example.org:5",
        "localhost.example.org:5",
        "[2001:db8::1]:5",
    ],
)
def test_whatever_only_looks_like_this_machine_takes_no_token_unencrypted_and_may_have_a_proxy(address):
    assert not is_local(address)
    assert grpc_options(address) == []
    with pytest.raises(ConfigError, match="unencrypted"):
        channel(address, token="secret")


def test_a_listener_is_found_whatever_its_family(tmp_path):
    path = tmp_path / "s.sock"
    found = []
    for family, where in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_INET6, ("::1", 0)),
        (socket.AF_UNIX, str(path)),
    ):
        with socket.socket(family) as server:
            server.bind(where)
            server.listen()
            address = f"unix:{path}" if family == socket.AF_UNIX else joined(*server.getsockname()[:2])
            assert listens(address)
            found.append(address)
    assert not any(map(listens, found))


def test_no_proxy_keeps_what_it_names_and_gains_the_loopback_once():
    once = without_proxy("intern.example, 10.0.0.0/8,localhost")
    assert once == "intern.example,10.0.0.0/8,localhost,127.0.0.1,::1,[::1],127.0.0.0/8"
    assert without_proxy(once) == once
    assert without_proxy("*") == "*"

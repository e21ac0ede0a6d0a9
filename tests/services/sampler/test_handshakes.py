"""A connection that is not made for want of TLS, or because of it, is said as that."""

from __future__ import annotations

from concurrent import futures

import grpc
import pytest

from distill_core.errors import Unavailable
from distill_service.channels import channel
from distill_service.status import errors_from
from tests.services.stack.tls import make_certificates


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("theirs"))


def said(credentials: grpc.ServerCredentials | None, **files: object) -> str:
    """What a client with these files is told by a server with these credentials."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    address = f"127.0.0.1:{port}"
    try:
        with (
            channel(address, retries=0, **files) as connection,
            pytest.raises(Unavailable) as caught,
            errors_from(address),
        ):
            connection.unary_unary("/any/call")(b"", timeout=240)
    finally:
        server.stop(0)
    assert f"the server at {address} " in str(caught.value)
    return str(caught.value)


def tls(files, *, mutual: bool = False) -> grpc.ServerCredentials:
    pair = (files["server.key"].read_bytes(), files["server.pem"].read_bytes())
    return grpc.ssl_server_credentials([pair], files["ca.pem"].read_bytes() if mutual else None, mutual)


def test_a_tls_server_asked_without_tls(ours):
    for mutual in (False, True):
        assert "if it speaks TLS, set DISTILLERY_TLS_CA" in said(tls(ours, mutual=mutual))


def test_a_server_that_asks_for_a_certificate(ours, theirs):
    wrong = {"cert": theirs["client.pem"], "key": theirs["client.key"]}
    for own in ({}, wrong):
        assert "where it asks for a certificate" in said(tls(ours, mutual=True), ca=ours["ca.pem"], **own)


def test_a_plain_server_asked_with_tls(ours):
    assert "speaks no TLS; unset DISTILLERY_TLS_CA" in said(None, ca=ours["ca.pem"])


def test_a_server_of_another_authority(ours, theirs):
    assert "does not vouch for" in said(tls(ours), ca=theirs["ca.pem"])

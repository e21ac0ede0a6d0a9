"""Client certificates and tokens: who gets in, by which client, and by what name they are known."""

import asyncio
import hashlib
import json

import pytest
from tritonclient.grpc import InferenceServerClient

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ConfigError, Unavailable
from distill_service.channels import channel
from distill_service.settings import load_settings
from distill_service.status import StatusError
from distillery_sampler.client import AsyncSamplerClient, SamplerClient
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.stack.tls import make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def store_url(tmp_path_factory):
    root = tmp_path_factory.mktemp("guarded")
    publish_denoiser(ArtifactStore(root / "store"), root / "model")
    return str(root / "store")


def files(certificates) -> dict:
    return {
        "ca": certificates["ca.pem"],
        "cert": certificates["client.pem"],
        "key": certificates["client.key"],
    }


def test_a_client_certificate_lets_every_client_in_and_names_it_in_the_audit_log(
    certificates, store_url, tmp_path
):
    audit = tmp_path / "audit.jsonl"
    settings = {**certificates.server(), "DISTILLERY_AUDIT_LOG": str(audit)}
    with SamplerProcess(store_url, settings) as sampler:
        with sampler.client(**files(certificates)) as client:
            client.wait_ready(20)
            assert len(client.generate("digits", class_labels=[1])) == 1
            client.load("digits")

        async def ask() -> int:
            async with AsyncSamplerClient(sampler.address, **files(certificates)) as other:
                return len([pair async for pair in other.generate_stream("digits", class_labels=[1, 2])])

        assert asyncio.run(ask()) == 2
        chain = {
            "root_certificates": str(certificates["ca.pem"]),
            "private_key": str(certificates["client.key"]),
            "certificate_chain": str(certificates["client.pem"]),
        }
        assert InferenceServerClient(sampler.address, ssl=True, **chain).is_server_ready()
        for without in ({"ca": certificates["ca.pem"]}, {}):
            with sampler.client(**without, retries=0) as stranger, pytest.raises(Unavailable):
                stranger.generate("digits", class_labels=[1], timeout_s=5)
        (line,) = [json.loads(line) for line in audit.read_text().splitlines()]
        assert (line["who"], line["target"], line["outcome"]) == ("client", "digits", "OK")


def test_a_token_beside_a_certificate_decides_what_may_be_done(certificates, store_url, tmp_path):
    digest = hashlib.sha256(b"open sesame").hexdigest()
    (tmp_path / "tokens").write_text(f"app:{digest}:use\n")
    settings = {**certificates.server(), "DISTILLERY_TOKENS_FILE": str(tmp_path / "tokens")}
    with SamplerProcess(store_url, settings) as sampler:
        with sampler.client(**files(certificates), token="open sesame") as client:
            assert len(client.generate("digits", class_labels=[1])) == 1
            with pytest.raises(StatusError, match="scope admin"):
                client.load("digits")
        with (
            sampler.client(**files(certificates)) as client,
            pytest.raises(StatusError, match="token is needed"),
        ):
            client.models()


def test_half_a_certificate_is_refused_before_anything_is_sent(certificates):
    with pytest.raises(ConfigError, match="belong together"):
        SamplerClient(ca=certificates["ca.pem"], cert=certificates["client.pem"])
    with pytest.raises(ConfigError, match="DISTILLERY_TLS_CA"):
        SamplerClient(cert=certificates["client.pem"], key=certificates["client.key"])
    with pytest.raises(ConfigError, match="cert .*none.pem cannot be read"):
        channel("127.0.0.1:1", **{**files(certificates), "cert": certificates["none.pem"]})


def test_the_settings_name_the_files_that_clients_take(certificates, monkeypatch):
    for name, value in files(certificates).items():
        monkeypatch.setenv(
            {"ca": "DISTILLERY_TLS_CA"}.get(name, f"DISTILLERY_TLS_CLIENT_{name.upper()}"), str(value)
        )
    assert load_settings().client_tls() == files(certificates)

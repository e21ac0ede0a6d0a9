"""Certificates for tests: an authority, a server's on loopback, a client's."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificates:
    """PEM files in `folder`: `ca.pem`; `server.pem`, `client.pem` and their `.key`."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def server(self) -> dict[str, str]:
        """The settings of a server that asks clients for a certificate."""
        return {
            "DISTILLERY_TLS_CERT": str(self["server.pem"]),
            "DISTILLERY_TLS_KEY": str(self["server.key"]),
            "DISTILLERY_TLS_CLIENT_CA": str(self["ca.pem"]),
        }


def make_certificates(folder: Path) -> Certificates:
    """New ones; skips the test where openssl is not installed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate to test with")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=tests"
    )
    names = {"server": "subjectAltName=IP:127.0.0.1,DNS:localhost", "client": "keyUsage=digitalSignature"}
    for name, extension in names.items():
        (folder / f"{name}.ext").write_text(extension)
        openssl(
            "req", "-new", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem", "-days", "2")
    return Certificates(folder)

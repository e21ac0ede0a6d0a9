"""The committed generated code is what the .proto files give, and they follow buf's rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[1] / "proto"
SOURCES = sorted(PROTO.glob("distillery/v1/*.proto"))
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    sources = [str(source.relative_to(PROTO)) for source in SOURCES]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *sources]
    subprocess.run(command, cwd=PROTO, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_code_is_what_the_protos_generate(generated, source):
    for suffix in SUFFIXES:
        committed = source.with_name(source.stem + suffix)
        fresh = generated / committed.relative_to(PROTO)
        assert committed.read_text() == fresh.read_text(), f"{committed.name} is stale: run make proto"


def test_no_generated_file_is_left_over_from_a_removed_proto():
    left = {path.name for suffix in SUFFIXES for path in PROTO.rglob(f"*{suffix}")}
    assert left == {source.stem + suffix for source in SOURCES for suffix in SUFFIXES}


def test_protos_follow_bufs_standard_rules(tmp_path):
    buf = Path(sys.executable).with_name("buf")
    environment = {**os.environ, "BUF_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([buf, "lint"], cwd=PROTO, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

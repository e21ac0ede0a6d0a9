"""Each block of `docs/serving.md` does what the page says, against a live sampler."""

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from distill_core.artifacts import ArtifactStore
from distill_core.errors import ERROR_CODES
from distill_service.channels import MAX_RETRIES, _options
from distill_service.rpc import MAX_RECEIVE_BYTES
from distillery_sampler.settings import SamplerSettings
from tests.helpers import REPOSITORY
from tests.services.cli.test_examples import sampler  # noqa: F401
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.stack.tls import make_certificates
from tests.test_readme import blocks

PAGE = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:50052"
SNIPPETS = [code for code in blocks(PAGE, "python") if ADDRESS in code]
COMMANDS = [shlex.split(line) for block in blocks(PAGE, "bash") for line in block.splitlines()]


def heading(code: str) -> str:
    """The heading that a block stands under."""
    return re.findall(r"^## (.*)$", PAGE[: PAGE.index(code)], re.M)[-1]


@pytest.mark.parametrize("code", SNIPPETS, ids=heading)
def test_the_programs_run_as_they_stand(code, sampler, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(ADDRESS, sampler.address), "serving.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
    wanted = set(re.findall(r"\(f?\"([\w{}-]+\.(?:png|webp))\"\)", code))
    assert {re.sub(r"\{.*\}", "*", name) for name in wanted} <= {
        re.sub(r"\d", "*", path.name) for path in tmp_path.iterdir()
    }


def test_nothing_on_the_page_is_left_out():
    languages = set(re.findall(r"^```(\w+)\n", PAGE, re.M))
    assert languages == {"python", "bash"}
    guarded = [code for code in blocks(PAGE, "python") if ADDRESS not in code]
    assert len(guarded) == 1  # TLS and tokens, below
    assert len(SNIPPETS) == 9
    assert {command[0] for command in COMMANDS} == {"grpcurl"}


def reflection():
    """`examples/reflection.py`."""
    spec = importlib.util.spec_from_file_location("reflection", REPOSITORY / "examples/reflection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_reflection(address: str, command: list[str]) -> str:
    """What grpcurl prints, without grpcurl: the options that the page uses."""
    words = [word for word in command[1:] if word != "-plaintext"]
    request = "{}"
    if words[0] == "-d":
        request, words = words[1], words[2:]
    assert words[0] == ADDRESS
    if words[1] not in ("list", "describe"):
        return "\n".join(reflection().call(address, words[1], request))
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        if words[1] == "list":
            return "\n".join(database.get_services())
        service = DescriptorPool(database).FindServiceByName(words[2])
        return "\n".join(method.name for method in service.methods)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_the_grpcurl_calls_are_answered_by_reflection(command, sampler):  # noqa: F811
    if shutil.which("grpcurl"):
        words = [word.replace(ADDRESS, sampler.address) for word in command]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    else:
        said = by_reflection(sampler.address, command)
    wanted = {
        "list": ["distillery.v1.ModelsService", "inference.GRPCInferenceService"],
        "distillery.v1.SamplerService": ["GenerateStream", "RenderPath"],
        "distillery.v1.ModelsService/ListModels": ['"dmd2-digits"', '"procedural-scene"'],
        "distillery.v1.SamplerService/Generate": ['"data"', '"dmd2-digits@1"'],
        "distillery.v1.SamplerService/GenerateStream": ['"image"', '"summary"'],
        "inference.GRPCInferenceService/ModelStatistics": ['"inferenceCount"'],
    }[command[-1]]
    assert all(word in said for word in wanted), said


def test_the_block_on_tls_and_tokens_connects(tmp_path, monkeypatch, capsys):
    store = ArtifactStore(tmp_path / "store")
    publish_denoiser(store, tmp_path / "model")
    certificates = make_certificates(tmp_path)
    (tmp_path / "tokens").write_text(f"app:{hashlib.sha256(b'the token').hexdigest()}:use\n")
    (code,) = [code for code in blocks(PAGE, "python") if ADDRESS not in code]
    settings = certificates.server() | {"DISTILLERY_TOKENS_FILE": str(tmp_path / "tokens")}
    monkeypatch.chdir(tmp_path)
    with SamplerProcess(store.url, settings) as guarded:
        exec(compile(code.replace("sampler.example.org:50052", guarded.address), "serving.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "1"


def test_the_limits_are_the_defaults():
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| `DISTILLERY_SAMPLER_(\w+)` \|$", PAGE, re.M)
    assert len(rows) == 8
    for value, name in rows:
        assert SamplerSettings.model_fields[name.lower()].default == int(value)
    assert f"| {MAX_RECEIVE_BYTES} |" in PAGE


def test_the_errors_and_the_retry_policy_are_the_codes():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([A-Z_]+) \|", PAGE, re.M))
    assert rows == {
        cls.__name__: meaning.grpc_status for cls, meaning in ERROR_CODES.items() if cls.__name__ in rows
    }
    assert len(rows) == 5
    (policy,) = re.findall(r"`(\{\"methodConfig.*?\})`", PAGE, re.S)
    assert json.loads(policy) == json.loads(
        dict(_options("localhost:50052", MAX_RETRIES))["grpc.service_config"]
    )

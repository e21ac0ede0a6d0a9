"""The embedded stack as a user runs it: real processes, driven by the command line and the examples."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distill_core.config import load_recipe
from distill_core.errors import Unavailable
from distill_service.settings import settings
from distillery_cli.app import main
from distillery_cli.demo import stack_settings
from distillery_cli.stack import Stack, last_words
from tests.services.jobs_stack import wait_for

PIPELINE = """
name = "tiny"
[[stages]]
name = "teacher"
recipe = "teacher.toml"
set.steps = 2
[[stages]]
name = "onnx"
convert = "{teacher}"
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    known = stack_settings(tmp_path_factory.mktemp("stack"))
    with Stack(known) as running:
        running.start()
        yield running


@pytest.fixture
def user(stack, monkeypatch):
    """A shell whose variables name the running stack."""
    for name in ("state_dir", "store_url", "cache_dir", "jobs_port", "sampler_port"):
        monkeypatch.setenv(f"DISTILLERY_{name.upper()}", str(getattr(stack.settings, name)))
    settings.cache_clear()
    yield stack.settings
    settings.cache_clear()


@pytest.fixture(scope="module")
def served(stack, tmp_path_factory) -> str:
    """A model that went through the queue, both workers and the store."""
    path = tmp_path_factory.mktemp("pipeline") / "tiny.toml"
    path.write_text(PIPELINE, encoding="utf-8")
    network = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 8}
    tiny = load_recipe("edm_digits", {"batch_size": 8, "evaluate": {}, "network.args": network})
    (path.parent / "teacher.toml").write_text(tiny.to_toml(), encoding="utf-8")
    known = {name: getattr(stack.settings, name) for name in ("state_dir", "jobs_port")}
    variables = {f"DISTILLERY_{name.upper()}": str(value) for name, value in known.items()}
    command = [sys.executable, "-m", "distillery_cli", "submit", "--pipeline", str(path), "--watch", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=200
    )
    assert done.returncode == 0, done.stderr + done.stdout
    *events, job = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"change", "metrics", "job"} <= {key for event in events for key in event}
    assert [stage["state"] for stage in job["stages"]] == ["SUCCEEDED", "SUCCEEDED"]
    return job["artifact"]


def test_each_part_answers_its_probe(user, capsys):
    for address in (user.jobs_port, user.sampler_port):
        assert main(["health", "grpc", f"127.0.0.1:{address}"]) == 0
    for queue in ("train", "convert"):
        assert main(["health", "worker", "--queue", queue, "--timeout", "2"]) == 0
    assert main(["health", "worker", "--queue", "nobody", "--timeout", "0.5"]) == 75
    assert "no worker on queue 'nobody'" in capsys.readouterr().err


def test_doctor_sees_the_running_stack(user, capsys):
    main(["doctor", "--json"])
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "SERVING" in found["jobs api"]["said"]
    assert "SERVING" in found["sampler"]["said"]
    assert found["broker"]["state"] == "ok"


def test_a_pipeline_is_trained_converted_and_served(served, user, tmp_path, capsys):
    assert served == "edm-digits@2"
    assert (
        main(["generate", served, "--labels", "0-9", "--steps", "1", "--out", str(tmp_path / "a.png")]) == 0
    )
    assert (
        main(["generate", served, "--labels", "0-9", "--steps", "1", "--out", str(tmp_path / "b.png")]) == 0
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    assert main(["jobs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {job["kind"] for job in listed} >= {"pipeline", "train", "convert"}


def test_a_mistake_in_a_recipe_is_refused_before_it_is_queued(user, capsys):
    assert main(["submit", "edm_digits", "-s", "stepps=1"]) == 2
    assert "unknown key stepps; did you mean 'steps'?" in capsys.readouterr().err


def test_a_failed_job_is_told_in_one_sentence_with_its_exit_code(user, capsys):
    code = main(["submit", "edm_digits", "-s", "data.name=images", "-s", "data.path=/nowhere", "--watch"])
    err = capsys.readouterr().err
    assert code in (65, 67)
    assert "/nowhere" in err
    assert "Traceback" not in err


def test_a_queued_job_is_cancelled_and_retried(user, capsys):
    assert main(["submit", "edm_digits", "-s", "steps=100000", "--json"]) == 0
    job = json.loads(capsys.readouterr().out)["id"]
    assert main(["cancel", job]) == 0
    assert main(["watch", job]) == 143
    assert main(["retry", job]) == 0
    assert main(["cancel", job]) == 0
    assert main(["watch", job]) == 143


def test_a_port_that_is_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = stack_settings(tmp_path).model_copy(update={"sampler_port": taken.getsockname()[1]})
        with Stack(known) as stack, pytest.raises(Unavailable, match="DISTILLERY_SAMPLER_PORT"):
            stack.start()
    assert stack.running == []


def test_a_part_that_dies_is_named_and_nothing_is_left_behind(tmp_path):
    with Stack(stack_settings(tmp_path)) as stack:
        stack.start()
        pids = [running.process.pid for running in stack.running]
        os.kill(pids[-1], signal.SIGKILL)
        stack.running[-1].process.wait()
        with pytest.raises(
            Unavailable, match="the sampler ended with SIGKILL .*`distillery up` starts all again"
        ):
            stack.check()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the parts to end")


def test_up_runs_until_it_is_told_to_stop(tmp_path):
    known = stack_settings(tmp_path)
    names = ("state_dir", "jobs_port", "sampler_port")
    variables = {f"DISTILLERY_{name.upper()}": str(getattr(known, name)) for name in names}
    off = {f"DISTILLERY_{part}_METRICS_PORT": "0" for part in ("JOBS", "WORKER", "SAMPLER", "CONVERTER")}
    process = subprocess.Popen(
        [sys.executable, "-m", "distillery_cli", "up", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables, **off},
    )
    assert process.stdout is not None
    parts = json.loads(process.stdout.readline())
    assert [part["name"] for part in parts] == ["jobs api", "trainer worker", "converter worker", "sampler"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{part['pid']}").exists() for part in parts), "the parts to end")


def test_the_last_line_of_a_log_is_quoted(tmp_path):
    (tmp_path / "log").write_text("first\nerror: the last\n\n", encoding="utf-8")
    assert last_words(tmp_path / "log") == "error: the last"
    assert last_words(tmp_path / "none") == "no log"

"""The embedded stack as a user runs it: real processes, driven by the command line and the examples."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from distill_core.errors import Unavailable
from distill_core.recipe import load_recipe
from distill_service.logs import configure_logging
from distill_service.settings import settings
from distillery_cli.app import main
from distillery_cli.stack import up as stacks
from distillery_cli.stack.demo import stack_settings
from distillery_cli.stack.health import grpc_state
from distillery_cli.stack.up import Part, Stack, environment, last_words, only_one
from tests.services.jobs.jobs_stack import alive, wait_for

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
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
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


def pids(stack: Stack) -> dict[str, int]:
    return {running.part.name: running.process.pid for running in stack.running}


def is_serving(address: str) -> bool:
    try:
        return grpc_state(address, timeout_s=2) == "SERVING"
    except Unavailable:
        return False


def test_a_part_that_dies_is_started_again_and_the_others_go_on(tmp_path, capfd):
    with Stack(stack_settings(tmp_path)) as stack:
        stack.start()
        before = pids(stack)
        os.kill(before["sampler"], signal.SIGKILL)
        wait_for(lambda: stack.tend() or pids(stack)["sampler"] != before["sampler"], "a new sampler")
        after = pids(stack)
        assert {name for name in before if before[name] != after[name]} == {"sampler"}
        address = f"127.0.0.1:{stack.settings.sampler_port}"
        wait_for(lambda: is_serving(address), "the sampler to answer", 90)
        stack.tend()
        assert pids(stack) == after
    (event,) = logged(capfd)
    assert (event["part"], event["again_in_s"]) == ("sampler", 1.0)
    assert event["ended_with"].startswith("SIGKILL (out of memory")
    left = [*before.values(), *after.values()]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), "the parts to end")


def logged(capfd) -> list[dict]:
    """What the stack's log says of deaths."""
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    return [line for line in lines if "a part died" in line["event"]]


def test_a_part_that_dies_at_once_is_tried_after_pauses_that_grow(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(stacks, "FIRST_PAUSE_S", 0.03)
    monkeypatch.setattr(stacks, "LONGEST_PAUSE_S", 0.12)
    with Stack(stack_settings(tmp_path)) as stack:
        configure_logging("cli", stack.settings)
        part = Part("hopeless", "no_such_module", "nowhere", lambda: None)
        running = stack._launch(part, environment(stack.settings))
        running.well = True
        stack.running.append(running)
        wait_for(lambda: stack.tend() or stack.running[0].deaths == 4, "four deaths")
    said = logged(capfd)
    assert [event["again_in_s"] for event in said] == [0.03, 0.06, 0.12, 0.12]
    assert all("No module named no_such_module" in event["ended_with"] for event in said)


def test_a_part_that_cannot_start_at_all_ends_the_stack(tmp_path, monkeypatch):
    probe = partial(grpc_state, "127.0.0.1:1", timeout_s=0.1)
    hopeless = Part("hopeless", "no_such_module", "127.0.0.1:1", probe)
    monkeypatch.setattr(stacks, "parts", lambda settings: [hopeless])
    with (
        Stack(stack_settings(tmp_path)) as stack,
        pytest.raises(Unavailable, match="the hopeless ended with exit code 1: .*No module named"),
    ):
        stack.start()
    assert stack.running == []


def test_a_state_folder_has_one_stack_and_a_lock_that_nobody_holds_is_taken(tmp_path):
    (tmp_path / "up.lock").write_text(
        "1 on another machine"
    )  # of a process that is gone; its number is in use again
    with only_one(tmp_path):
        said = f"its process is {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(Unavailable, match=said), only_one(tmp_path):
            pass
    with only_one(tmp_path):
        pass
    with pytest.raises(Unavailable, match="set DISTILLERY_STATE_DIR"), only_one(tmp_path / "up.lock"):
        pass


class Up:
    """`distillery up` as a process of its own."""

    def __init__(self, folder: Path, said: str = "up") -> None:
        known = stack_settings(folder)
        names = ("state_dir", "jobs_port", "sampler_port")
        own = {f"DISTILLERY_{name.upper()}": str(getattr(known, name)) for name in names}
        off = {f"DISTILLERY_{part}_METRICS_PORT": "0" for part in ("JOBS", "WORKER", "SAMPLER", "CONVERTER")}
        self.said = folder / f"{said}.err"
        self.out = folder / f"{said}.out"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distillery_cli", "up", "--json"],
            stdout=self.out.open("w"),
            stderr=self.said.open("w"),
            env={**os.environ, **own, **off},
        )

    def __enter__(self) -> Up:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def parts(self) -> list[dict]:
        wait_for(lambda: self.out.read_text().endswith("\n"), "all parts to be ready", 120)
        return json.loads(self.out.read_text())

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def test_up_outlives_its_parts_refuses_a_second_and_ends_all_when_it_is_told(tmp_path):
    with Up(tmp_path) as up:
        parts = up.parts()
        names = ["jobs api", "trainer worker", "converter worker", "sampler"]
        assert [part["name"] for part in parts] == names
        with Up(tmp_path, said="second") as second:
            assert second.process.wait() == 75
            assert f"its process is {up.process.pid} on " in " ".join(second.said.read_text().split())
        os.kill(parts[1]["pid"], signal.SIGKILL)
        wait_for(lambda: not alive(parts[1]["pid"]), "the worker to end")
        wait_for(lambda: len(up.children()) >= len(parts), "another worker")
        assert up.process.poll() is None
        children = up.children()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait() == 0
        wait_for(lambda: not any(alive(child.pid) for child in children), "the parts to end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_up_ends_in_the_middle_of_its_start_when_it_is_told(tmp_path, number):
    with Up(tmp_path) as up:
        wait_for(lambda: "sampler starting" in up.said.read_text(), "the parts to be started", 90)
        children = up.children()
        up.process.send_signal(number)
        assert up.process.wait() == 0
        assert up.out.read_text() == ""
        wait_for(lambda: not any(alive(child.pid) for child in children), "the parts to end")


def test_the_last_line_of_a_log_is_quoted(tmp_path):
    (tmp_path / "log").write_text("first\nerror: the last\n\n", encoding="utf-8")
    assert last_words(tmp_path / "log") == "error: the last"
    assert last_words(tmp_path / "none") == "no log"

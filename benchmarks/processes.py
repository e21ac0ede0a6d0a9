"""The processes of `python -m benchmarks serving`: the bare runtime, servers, and the load generator beside each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.sampler import SIGMA, Subject
from distill_core.errors import Unavailable

HERE = Path(__file__).parent
START_S = 180.0
STOP_S = 20.0


class Served(NamedTuple):
    """A published subject and its graph: the same file for everybody."""

    subject: Subject
    ref: str
    graph: Path


class Child:
    """A process that dies with this one, its output in a log."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log, self._command = log, command
        self._assignments = [f"{name}={value}" for name, value in (environment or {}).items()]

    def __enter__(self) -> Self:
        from distill_service.jobs.guard import guarded

        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                guarded("env", *self._assignments, *self._command),
                stdin=subprocess.PIPE,
                stdout=self._stdout(log),
                stderr=log,
                start_new_session=True,
            )
        return self

    def _stdout(self, log: Any) -> Any:
        return log

    def __exit__(self, *_: object) -> None:
        """SIGTERM, and SIGKILL for whoever of its session is still there afterwards."""
        if self.process.stdin:
            self.process.stdin.close()
        for number, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def cpu_seconds(self) -> float:
        """CPU seconds that it and its children have used so far."""
        import psutil

        total = 0.0
        with_children = psutil.Process(self.process.pid)
        for process in (with_children, *with_children.children(recursive=True)):
            try:
                used = process.cpu_times()
            except psutil.Error:
                continue
            total += used.user + used.system
        return total

    def failed(self, what: str) -> Unavailable:
        """Reason why it cannot be used, with the end of its log."""
        from distillery_cli.stack.up import last_words

        return Unavailable(f"{what}: {last_words(self.log)}; its log is {self.log}")


class Asked(Child):
    """A process that answers one JSON line with another."""

    def _stdout(self, log: Any) -> Any:
        return subprocess.PIPE

    def __enter__(self) -> Self:
        super().__enter__()
        self._answer()
        return self

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            Unavailable: the process has ended.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(STOP_S)
            raise self.failed(f"{Path(self._command[2]).name} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def bare(served: Served, threads: int, work: Path) -> Asked:
    """ONNX Runtime alone with the subject's graph."""
    shape = ",".join(map(str, served.subject.shape))
    arguments = [str(served.graph), shape, str(threads), str(SIGMA)]
    return Asked([sys.executable, "-P", str(HERE / "bare.py"), *arguments], work / "bare.log")


def load(python: str, client: Path, address: str, model: str, work: Path, patience_s: float = 5.0) -> Asked:
    """The load generator with a server's client; ready when the server has answered one call."""
    command = [python, "-P", str(HERE / "load.py"), str(client), address, model, str(patience_s)]
    return Asked(command, work / "load.log")


class Sampler(Child):
    """`python -m distillery_sampler.server` with one model, one instance of `threads` threads and `more` variables."""

    def __init__(self, ref: str, state: Path, threads: int, **more: str) -> None:
        from distillery_cli.stack.demo import stack_settings
        from distillery_cli.stack.up import environment

        shared = stack_settings(state)
        self.address = shared.sampler_address
        own = {
            "DISTILLERY_SAMPLER_PRELOAD": json.dumps([ref]),
            "DISTILLERY_SAMPLER_INSTANCES": "1",
            "DISTILLERY_SAMPLER_THREADS": str(threads),
            "DISTILLERY_LOG_LEVEL": "warning",
        }
        module = [sys.executable, "-m", "distillery_sampler.server"]
        super().__init__(module, state / "logs" / "sampler.log", {**environment(shared), **own, **more})

    def start_seconds(self) -> float:
        """Seconds from its start until it said SERVING."""
        from distillery_cli.stack.health import grpc_state

        began = time.perf_counter()
        while time.perf_counter() - began < START_S:
            if self.process.poll() is not None:
                break
            try:
                if grpc_state(self.address, timeout_s=1) == "SERVING":
                    return time.perf_counter() - began
            except Unavailable:
                pass
            time.sleep(0.02)
        raise self.failed("the sampler did not start")


def publish(subject: Subject, state: Path) -> Served:
    """The subject in the store of `state`, converted; one of an earlier run is used again."""
    from benchmarks.sampler import converted, graph_of
    from distill_core.artifacts import ArtifactStore
    from distill_core.errors import NotFound
    from distillery_cli.stack.demo import stack_settings
    from distillery_cli.stack.up import Stack

    settings = stack_settings(state)
    store = ArtifactStore(settings.store_url)
    try:
        manifest = store.manifest(subject.name)
    except NotFound:
        manifest = None
    if manifest is None or "onnx-fp32" not in manifest.exports:
        shutil.rmtree(state / f"untrained-{subject.name}", ignore_errors=True)
        with Stack(settings) as stack:
            stack.start()
            ref = converted(subject, settings.store_url, settings.jobs_address, state)
    else:
        ref = manifest.ref
    return Served(subject, ref, graph_of(settings.store_url, ref))

"""`distillery up`: broker, Jobs API, trainer and converter workers, and sampler on this machine."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from distill_core.errors import DistilleryError, Unavailable
from distillery_cli.output import AsJson, emit_json, notes, results, table

if TYPE_CHECKING:
    from distill_service.settings import Settings

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.3
TAIL_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """One process of the stack; `probe` returns once it is well, and raises `Unavailable` before."""

    name: str
    module: str
    address: str
    probe: Callable[[], Any]


@dataclass
class Running:
    """A started part and its log file."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    stdout: IO[bytes]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parts(settings: Settings) -> list[Part]:
    """The stack's processes, in the order in which they start; each finds the broker by the same settings."""
    from distillery_cli.health import grpc_state, worker_state

    def server(name: str, module: str, host: str, port: int) -> Part:
        address = f"{host}:{port}"
        return Part(name, module, address, lambda: _serving(grpc_state(address, timeout_s=2), address))

    def worker(name: str, module: str, queue: str) -> Part:
        return Part(name, module, f"queue {queue}", lambda: worker_state(queue, settings, timeout_s=2))

    return [
        server("jobs api", "distillery_trainer.server", settings.jobs_host, settings.jobs_port),
        worker("trainer worker", "distillery_trainer.worker", "train"),
        worker("converter worker", "distillery_converter.worker", "convert"),
        server("sampler", "distillery_sampler.server", settings.sampler_host, settings.sampler_port),
    ]


def _serving(state: str, address: str) -> None:
    if state != "SERVING":
        raise Unavailable(f"{address} answers {state}")


class Stack:
    """Starts every part as a child process, waits until each is well, and stops all of them at the end.

    A part dies with this process however it ends. Logs are `<state_dir>/logs/<part>.log`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.logs = settings.state_dir / "logs"
        self.running: list[Running] = []
        self._broker = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, tell: Callable[[str, str], None] = lambda name, state: None) -> None:
        """Start everything; `tell(part, state)` hears of each step.

        Raises:
            Unavailable: a part ended, or was not well in time; the sentence quotes the end of its log.
        """
        from distill_service.jobs.broker import running_broker
        from distill_service.logs import configure_logging

        configure_logging("cli", self.settings.model_copy(update={"log_level": "warning"}))
        self.logs.mkdir(parents=True, exist_ok=True)
        wanted = parts(self.settings)
        self._check_ports(wanted)
        tell("broker", "starting")
        self._broker.enter_context(running_broker(self.settings))
        tell("broker", "ready")
        for part in wanted:
            tell(part.name, "starting")
            self.running.append(self._launch(part, environment(self.settings)))
        for running in self.running:
            self._wait_until_well(running)
            tell(running.part.name, "ready")

    def _check_ports(self, wanted: list[Part]) -> None:
        for part in wanted:
            host, _, port = part.address.rpartition(":")
            if not host or not port.isdigit():
                continue
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    name = "JOBS" if "job" in part.name else "SAMPLER"
                    raise Unavailable(
                        f"port {port} for the {part.name} is in use; stop what listens there, "
                        f"or set DISTILLERY_{name}_PORT to another"
                    )

    def _launch(self, part: Part, values: Mapping[str, str]) -> Running:
        from distill_service.jobs.guard import guarded

        log = self.logs / f"{part.name.replace(' ', '-')}.log"
        stdout = log.open("ab")
        assignments = [f"{name}={value}" for name, value in values.items()]
        command = guarded("env", *assignments, sys.executable, "-m", part.module)
        # Its own session: Ctrl-C reaches this process alone, which then stops the parts in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
        )
        return Running(part, process, log, stdout)

    def _wait_until_well(self, running: Running) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self.check()
            try:
                running.part.probe()
                return
            except DistilleryError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the {running.part.name} was not ready within {START_TIMEOUT_S:.0f} s ({error}); "
                        f"its log is {running.log}"
                    ) from None
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raise `Unavailable` if a part has ended by itself."""
        for running in self.running:
            code = running.process.poll()
            if code is not None:
                how = f"exit code {code}: {last_words(running.log)}"
                if code < 0:  # its log cannot say why
                    how = f"{signal.Signals(-code).name} (out of memory, or killed by hand)"
                raise Unavailable(
                    f"the {running.part.name} ended with {how}; its log is {running.log}; "
                    "`distillery up` starts all again, and jobs go on from their checkpoints"
                )

    def stop(self) -> None:
        """Stop the parts in reverse order; one that does not end in time is killed."""
        for running in reversed(self.running):
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for running in reversed(self.running):
            try:
                running.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            running.stdout.close()
        self.running.clear()
        self._broker.close()


def environment(settings: Settings) -> dict[str, str]:
    """The variables that give a child these settings; empty means unset. It inherits the secrets."""
    secret = {"token", "token_file"}
    values = {name: getattr(settings, name) for name in type(settings).model_fields if name not in secret}
    written = {name: "" if value is None else str(value) for name, value in values.items()}
    # a URL with a password must not appear on a command line
    return {f"DISTILLERY_{name.upper()}": value for name, value in written.items() if "@" not in value}


def last_words(log: Path) -> str:
    """The last line of a log, shortened."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = [
                line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()
            ]
    except OSError:
        return "no log"
    return lines[-1][:300] if lines else "it logged nothing"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: distillery up  ·  DISTILLERY_SAMPLER_PORT=6000 distillery up")(up)


def up(as_json: AsJson = False) -> int:
    """Run the whole stack on this machine until Ctrl-C: broker, Jobs API, workers and sampler."""
    from distill_service.settings import settings

    with Stack(settings()) as stack:
        stack.start(lambda name, state: notes.print(f"{name} {state}"))
        with _until_stopped() as stopped:
            _announce(stack, as_json)
            while not stopped.wait(POLL_S):
                stack.check()
        notes.print("stopping; a running job goes back to its queue with a checkpoint")
    return 0


def _announce(stack: Stack, as_json: bool) -> None:
    rows = [[r.part.name, r.part.address, r.process.pid, str(r.log)] for r in stack.running]
    if as_json:
        emit_json([dict(zip(("name", "address", "pid", "log"), row, strict=True)) for row in rows])
        return
    results.print(table(["part", "at", "pid", "log"], rows))
    results.print("next: distillery submit edm_digits --watch; Ctrl-C stops the stack")


@contextlib.contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets."""
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

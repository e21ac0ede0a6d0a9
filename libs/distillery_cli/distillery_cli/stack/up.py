"""`distillery up`: broker, Jobs API, trainer and converter workers, and sampler on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
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

import structlog
import typer

from distill_core.errors import DistilleryError, Unavailable
from distillery_cli.terminal.output import AsJson, StoreUrl, emit_json, notes, results, table

if TYPE_CHECKING:
    from distill_service.settings import Settings

START_TIMEOUT_S = 90.0
STOP_MARGIN_S = 10.0  # beyond the time that a worker gives its job for a checkpoint
POLL_S = 0.3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a dead part is started again; doubled each time
STEADY_S = 60.0  # a part that ran for so long begins with the first pause again
TAIL_BYTES = 4096
_log = structlog.get_logger("distillery.up")


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
    began: float  # monotonic time, as `again_at`
    well: bool = False  # it was, once: from then on it is started again when it dies
    deaths: int = 0  # in a row, each soon after its start
    again_at: float | None = None  # it is dead, and started again then

    def how_it_ended(self) -> str:
        """Meaning of its exit code, or the signal that it died of."""
        code = self.process.returncode
        if code >= 0:
            return f"exit code {code}: {last_words(self.log)}"
        name = signal.Signals(-code).name  # its log cannot say why
        return f"{name} (out of memory, or killed by hand)" if code == -signal.SIGKILL else name


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parts(settings: Settings) -> list[Part]:
    """The stack's processes, in the order in which they start; each finds the broker by the same settings."""
    from distillery_cli.stack.health import grpc_state, worker_state

    def server(name: str, module: str, address: str) -> Part:
        return Part(name, module, address, lambda: _serving(grpc_state(address, timeout_s=2), address))

    def worker(name: str, module: str, queue: str) -> Part:
        return Part(name, module, f"queue {queue}", lambda: worker_state(queue, settings, timeout_s=2))

    return [
        server("jobs api", "distillery_trainer.server", settings.jobs_address),
        worker("trainer worker", "distillery_trainer.worker", "train"),
        worker("converter worker", "distillery_converter.worker", "convert"),
        server("sampler", "distillery_sampler.server", settings.sampler_address),
    ]


def _serving(state: str, address: str) -> None:
    if state != "SERVING":
        raise Unavailable(f"{address} answers {state}")


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """One stack over a state folder: the kernel lets go of this lock however the process that holds it ends.

    Raises:
        Unavailable: another stack holds it, or the folder cannot be written.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "up.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise Unavailable(
            f"the state folder {state_dir} cannot be written: {error.strerror}; set DISTILLERY_STATE_DIR"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Unavailable(
                f"another stack runs over {state_dir}, its process is {lock.read().strip() or 'starting'}; stop that "
                "one, or give this one a folder of its own with DISTILLERY_STATE_DIR"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


class Stack:
    """Starts every part as a child process, tends them, and stops all of them at the end.

    A part dies with this process however it ends, so the thread that starts a stack has to outlive it. Logs are
    `<state_dir>/logs/<part>.log`. Who sets `stopped` ends a start that is under way.
    """

    def __init__(self, settings: Settings, stopped: threading.Event | None = None) -> None:
        self.settings = settings
        self.logs = settings.state_dir / "logs"
        self.running: list[Running] = []
        self.stopped = stopped or threading.Event()
        self._until = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, tell: Callable[[str, str], None] = lambda name, state: None) -> None:
        """Start everything; `tell(part, state)` hears of each step.

        Raises:
            Unavailable: another stack runs over this state; a part cannot start, or was not well in time, and the
                sentence quotes the end of its log.
        """
        from distill_service.jobs.broker import running_broker
        from distill_service.logs import configure_logging

        configure_logging("cli", self.settings.model_copy(update={"log_level": "warning"}))
        self._until.enter_context(only_one(self.settings.state_dir))
        services = parts(self.settings)
        self._check_ports(services)
        tell("broker", "starting")
        self._until.enter_context(running_broker(self.settings))
        tell("broker", "ready")
        for part in services:
            tell(part.name, "starting")
            self.running.append(self._launch(part, environment(self.settings)))
        for running in self.running:
            self._wait_until_well(running)
            if self.stopped.is_set():
                return
            running.well = True
            tell(running.part.name, "ready")

    def _check_ports(self, wanted: list[Part]) -> None:
        from distill_service.addresses import is_socket, listens

        for part in wanted:
            if part.address.startswith("queue ") or not listens(part.address):
                continue
            name = "JOBS" if "job" in part.name else "SAMPLER"
            raise Unavailable(
                f"{part.address} for the {part.name} is in use; stop what listens there, "
                f"or set DISTILLERY_{name}_{'HOST' if is_socket(part.address) else 'PORT'} to another"
            )

    def _launch(self, part: Part, values: Mapping[str, str]) -> Running:
        from distill_service.jobs.guard import guarded

        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{part.name.replace(' ', '-')}.log"
        stdout = log.open("ab")
        assignments = [f"{name}={value}" for name, value in values.items()]
        command = guarded("env", *assignments, sys.executable, "-m", part.module)
        # Its own session: Ctrl-C reaches this process alone, which then stops the parts in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
        )
        return Running(part, process, log, stdout, time.monotonic())

    def _wait_until_well(self, running: Running) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.stopped.is_set():
            if running.process.poll() is not None:
                raise Unavailable(
                    f"the {running.part.name} ended with {running.how_it_ended()}; its log is {running.log}"
                )
            self.tend()
            try:
                running.part.probe()
                return
            except DistilleryError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the {running.part.name} was not ready within {START_TIMEOUT_S:.0f} s ({error}); "
                        f"its log is {running.log}"
                    ) from None
            self.stopped.wait(POLL_S)

    def tend(self) -> None:
        """Start parts that died by themselves again, after pauses that grow; the others go on."""
        now = time.monotonic()
        for position, running in enumerate(self.running):
            if running.again_at is not None and now >= running.again_at:
                self.running[position] = self._again(running)
            elif running.again_at is None and running.well and running.process.poll() is not None:
                running.stdout.close()
                _plan(running, running.how_it_ended(), steady=now - running.began >= STEADY_S)

    def _again(self, dead: Running) -> Running:
        try:
            alive = self._launch(dead.part, environment(self.settings))
        except OSError as error:  # no memory for a process now, or no file for its log
            _plan(dead, f"no process, as it cannot be started: {error.strerror}")
            return dead
        alive.well, alive.deaths = True, dead.deaths
        _log.warning("a part was started again", part=dead.part.name, pid=alive.process.pid)
        return alive

    def stop(self) -> None:
        """Stop the parts in reverse order; one that does not end in time is killed."""
        for running in reversed(self.running):
            running.again_at = None
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.settings.stop_grace_s + STOP_MARGIN_S
        for running in reversed(self.running):
            try:
                running.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            running.stdout.close()
        self.running.clear()
        self._until.close()


def _plan(dead: Running, how: str, *, steady: bool = False) -> None:
    """Say of what a part died, and when it is started again."""
    dead.deaths = 1 if steady else dead.deaths + 1
    pause = min(FIRST_PAUSE_S * 2 ** (dead.deaths - 1), LONGEST_PAUSE_S)
    dead.again_at = time.monotonic() + pause
    _log.warning(
        "a part died and is started again; the others go on",
        part=dead.part.name,
        ended_with=how,
        again_in_s=pause,
        log=str(dead.log),
    )


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


def up(store: StoreUrl = None, as_json: AsJson = False) -> int:
    """Run the whole stack on this machine until Ctrl-C: broker, Jobs API, workers and sampler."""
    from distill_service.settings import load_settings

    known = load_settings(**{"store_url": store} if store else {})
    with _until_stopped() as stopped, Stack(known, stopped) as stack:
        stack.start(lambda name, state: notes.print(f"{name} {state}"))
        if not stopped.is_set():
            _announce(stack, as_json)
        while not stopped.wait(POLL_S):
            stack.tend()
        notes.print("stopping; a running job goes back to its queue with a checkpoint (again: at once)")
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
    """An event that Ctrl-C, SIGTERM or the terminal's end sets; not that end, where `nohup` said to live on."""
    stopped = threading.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def stop(*_: object) -> None:
        if stopped.is_set():  # asked twice: the parts die with this process
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

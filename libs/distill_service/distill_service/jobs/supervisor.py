"""Runs one claimed job: its process, its lease, its messages, its end.

The worker never loads a model library; the job is a process of its own, so its exit frees all device memory.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from distill_core.errors import ERROR_CODES, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, DistilleryError, Unavailable
from distill_service.jobs import queue
from distill_service.jobs.child import Child, FolderBusy, log_tail, prepare_run
from distill_service.jobs.database import Database
from distill_service.jobs.paths import check_paths
from distill_service.jobs.queue import Claim, Outcome
from distill_service.jobs.table import processes_of
from distill_service.settings import Settings

COMMANDS = {
    "train": "distill_core.job.entry",
    "evaluate": "distill_core.job.entry",
    "convert": "distillery_converter.run",
}
_POLL_S = 0.25  # how often a cancel is looked for
_STOP_TOGETHER_S = 1.0
_REPORT_S = 1.0  # progress is stored at most this often
Observer = Callable[[Claim, Mapping[str, Any]], None]  # told of each message of a job
_EXIT_RETRY = ERROR_CODES[Unavailable].exit_code
_log = structlog.get_logger("distillery.jobs")


@dataclass
class _Seen:
    """Messages of a child so far."""

    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    changed: bool = False

    def take(self, message: Mapping[str, Any]) -> None:
        values = {key: value for key, value in message.items() if key != "event"}
        if message["event"] == "progress":
            self.progress.update(values)
            self.changed = True
        elif message["event"] == "metrics":
            self.progress["metrics"] = values.get("values", {})
            self.changed = True
        elif message["event"] == "checkpoint":
            self.progress[queue.KEPT] = values["step"]
            self.changed = True
        elif message["event"] == "result":
            self.result = values
        elif message["event"] == "error":
            self.error = values


class Supervisor:
    """Runs claimed jobs one at a time. `stop()`, from any thread, gives the running one back to its queue."""

    def __init__(
        self,
        db: Database,
        settings: Settings,
        *,
        worker: str,
        commands: Mapping[str, str] = COMMANDS,
        observe: Observer = lambda claim, message: None,
    ) -> None:
        self.db, self.settings, self.observe = db, settings, observe
        self._worker, self._commands = worker, commands
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stopping_soon(self, wait_s: float) -> bool:
        """Whether `stop` is called within so many seconds."""
        return self._stopping.wait(wait_s)

    def stop(self) -> None:
        """End soon: the running job writes a checkpoint and returns to its queue; this does not count."""
        self._stopping.set()

    def run(self, claim: Claim) -> Outcome | None:
        """Run a claimed job to its end and record it. None: another worker has taken it over."""
        with structlog.contextvars.bound_contextvars(job_id=claim.id, attempt=claim.attempt):
            _log.info("job started", kind=claim.kind, name=claim.name)
            run_dir = self.settings.runs / claim.id
            try:
                child = self._start(claim, run_dir)
            except (OSError, DistilleryError, FolderBusy) as error:
                outcome: Outcome | None = _could_not_start(
                    error, retry_delay(claim.crashes, self.settings.heartbeat_s)
                )
            else:
                outcome = _Attempt(self, claim, child, run_dir / "log.txt").run()
            if outcome is None or not self._record(claim, outcome):
                _log.warning("job was taken over by another worker")
                return None
            _log.info("job ended", verdict=outcome.verdict, error=outcome.error.get("message", ""))
            return outcome

    def _start(self, claim: Claim, run_dir: Path) -> Child:
        if claim.kind not in self._commands:
            raise DistilleryError(f"this worker cannot run {claim.kind} jobs")
        settings = self.settings
        check_paths(claim.spec, settings)
        spec = prepare_run(
            run_dir,
            claim,
            store_url=settings.store_url,
            cache_dir=settings.cache_dir,
            roots=settings.readable_roots(),
        )
        processes = processes_of(claim.spec)
        return Child(self._commands[claim.kind], spec, log=run_dir / "log.txt", processes=processes)

    def _record(self, claim: Claim, outcome: Outcome) -> bool:
        """Write the outcome, waiting out a short absence of the database; after that the lease runs out."""
        deadline = time.monotonic() + self.settings.lease_s
        while True:
            try:
                return queue.finish(self.db, claim.id, claim.attempt, outcome, who=self._worker)
            except Unavailable as error:
                _log.warning("outcome not recorded yet", error=str(error))
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)


class _Attempt:
    """One run of a job's process."""

    def __init__(self, supervisor: Supervisor, claim: Claim, child: Child, log: Path) -> None:
        self._supervisor, self._claim, self._child, self._log = supervisor, claim, child, log
        self._db, self._settings = supervisor.db, supervisor.settings
        self._seen = _Seen()
        self._cancel = False
        self._renewed = self._reported = time.monotonic()
        self._kill_at: float | None = None

    def run(self) -> Outcome | None:
        ended = threading.Event()
        threading.Thread(target=self._guard_lease, args=(ended,), name="lease", daemon=True).start()
        try:
            while not self._child.exited():
                self._read(_POLL_S)
                if not self._keep_lease():
                    return None
                self._stop_if_asked()
        finally:
            self._child.end()
            ended.set()
        self._read(0.0)
        if _signal_of(self._child.returncode) == signal.SIGTERM or self._child.returncode == EXIT_STOPPED:
            # Whoever stops a whole container or unit tells all of its processes; ours may be the first to end.
            self._supervisor.stopping_soon(_STOP_TOGETHER_S)
        outcome = conclude(
            self._child.returncode,
            result=self._seen.result,
            error=self._seen.error,
            cancelled=self._cancel,
            preempted=self._supervisor.stopping,
            log=log_tail(self._log),
            delay_s=retry_delay(self._claim.crashes, self._settings.heartbeat_s),
        )
        return replace(outcome, progress=self._seen.progress)

    def _guard_lease(self, ended: threading.Event) -> None:
        """End the child once its lease has run out, even while a call to the database hangs."""
        while not ended.wait(_POLL_S):
            if time.monotonic() - self._renewed > self._settings.lease_s:
                _log.warning("lease ran out and the job is ended", lease_s=self._settings.lease_s)
                self._child.kill()
                return

    def _read(self, wait_s: float) -> None:
        for message in self._child.events(wait_s):
            self._seen.take(message)
            self._supervisor.observe(self._claim, message)

    def _keep_lease(self) -> bool:
        """Renew, store progress, learn of a cancel. False once the job is, or may be, another worker's."""
        now = time.monotonic()
        beat_s = min(self._settings.heartbeat_s, self._settings.lease_s / 3)
        report = self._seen.changed and now - self._reported >= min(_REPORT_S, beat_s)
        try:
            if report or now - self._renewed >= beat_s:
                answer = queue.heartbeat(
                    self._db,
                    self._claim.id,
                    self._claim.attempt,
                    lease_s=self._settings.lease_s,
                    progress=dict(self._seen.progress) if self._seen.changed else None,
                )
                self._renewed = self._reported = now
                self._seen.changed = False
            else:
                answer = queue.cancel_requested(self._db, self._claim.id, self._claim.attempt)
        except Unavailable as error:
            _log.warning("lease not renewed", error=str(error))
            return now - self._renewed < self._settings.lease_s
        self._cancel = bool(answer)
        return answer is not None

    def _stop_if_asked(self) -> None:
        if self._kill_at is None:
            if self._cancel or self._supervisor.stopping:
                self._kill_at = time.monotonic() + self._settings.stop_grace_s
                self._child.terminate()
        elif time.monotonic() > self._kill_at:
            _log.warning("job did not stop in time and is killed", grace_s=self._settings.stop_grace_s)
            self._child.kill()


def retry_delay(crashes: int, first_s: float) -> float:
    """Seconds before what was unavailable is tried again: doubled with each crash, up to `MAX_DELAY_S`."""
    return min(first_s * 2.0 ** min(crashes, 32), queue.MAX_DELAY_S)


def conclude(
    code: int,
    *,
    result: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    cancelled: bool = False,
    preempted: bool = False,
    log: str = "",
    delay_s: float = 0.0,
) -> Outcome:
    """Outcome of a job by its process's exit code. `delay_s`: before what was unavailable is tried again."""
    if code == 0:
        values = result or {}
        return Outcome("succeeded", str(values.get("artifact") or ""), dict(values.get("metrics") or {}))
    number = _signal_of(code)
    if code == EXIT_STOPPED or number is not None:
        if cancelled:
            message = "cancelled on request; its checkpoint is kept"
            return Outcome("cancelled", error={"type": "Cancelled", "message": message})
        if preempted:
            return Outcome("preempted", error={"type": "Preempted", "message": "its worker was stopped"})
        name = _signal_name(number) if number is not None else "SIGTERM from outside"
        return Outcome("crashed", error=_said("Killed", f"the job's process was ended by {name}", log))
    if code == EXIT_OUT_OF_MEMORY:
        words = (error or {}).get("message") or "out of memory; a smaller batch_size needs less"
        return Outcome("failed", error=_said("OutOfMemory", str(words), log))
    details = dict(error) if error else _said("ProcessFailed", _last_words(code, log), log)
    details.setdefault("log", log)
    if code == _EXIT_RETRY:
        return Outcome("crashed", error=details, delay_s=delay_s)
    return Outcome("failed", error=details)


def _signal_of(code: int) -> int | None:
    if code < 0:
        return -code
    return code - 128 if 128 < code <= 128 + 64 and code != EXIT_STOPPED else None


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name} (out of memory, or killed by hand)" if name == "SIGKILL" else name


def _said(kind: str, message: str, log: str) -> dict[str, Any]:
    return {"type": kind, "message": message, "log": log}


def _last_words(code: int, log: str) -> str:
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it logged nothing")
    return f"the job's process ended with exit code {code}: {last[:300]}"


def _could_not_start(error: Exception, delay_s: float) -> Outcome:
    details = {"type": type(error).__name__, "message": f"the job could not be started: {error}"}
    if isinstance(error, DistilleryError):
        return Outcome("failed", error=details)
    if isinstance(error, FolderBusy):  # no fault of the job's
        return Outcome("preempted", error=details, delay_s=delay_s)
    return Outcome("crashed", error=details, delay_s=delay_s)

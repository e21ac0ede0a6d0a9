"""A job's process: started in its own session, tied to us, read line by line, stopped as a group."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from distill_core.recipe import Recipe
from distill_service.jobs.guard import guarded
from distill_service.jobs.queue import Claim

MAX_LINE = 1 << 20  # bytes; a longer line of output is no message
_BATCH = 1000  # messages taken at once, so that a talkative job cannot delay its own lease
_HOLDER_BYTES = 128
_TAKEOVER_S = 10.0


class FolderBusy(Exception):
    """An earlier attempt's process on this machine still works in the run folder and cannot be ended."""


def prepare_run(
    run_dir: Path,
    claim: Claim,
    *,
    store_url: str,
    cache_dir: Path,
    roots: Sequence[Path] | None = None,
) -> Path:
    """Make the run folder, write `spec.json` (and `recipe.toml`) into it, and return the former's path.

    `roots` are the folders that the job's process may read data from; None: any.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe = claim.spec.get("recipe")
    if claim.kind == "train" and recipe is not None:
        _replace(run_dir / "recipe.toml", Recipe.parse(recipe).to_toml())
    content = {
        "job": claim.id,
        "attempt": claim.attempt,
        "kind": claim.kind,
        "spec": claim.spec,
        "run_dir": str(run_dir),
        "store": store_url,
        "cache": str(cache_dir),  # teachers trained from recipes, shared by all jobs of this machine
        "roots": None if roots is None else [str(root) for root in roots],
    }
    spec = run_dir / "spec.json"
    _replace(spec, json.dumps(content, indent=1))
    return spec


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Child:
    """A running job process. Iterate over `events()` until `returncode` is known."""

    def __init__(
        self, module: str, spec: Path, *, log: Path, cwd: Path | None = None, processes: int = 1
    ) -> None:
        launch = (
            ["-m", "distill_core.job.launch", str(processes), module] if processes > 1 else ["-m", module]
        )
        lock = _take_folder(spec.parent / ".lock")
        try:
            # Blank first: room for the holder on a full disk, and no earlier process is taken for this one.
            os.pwrite(lock, b" " * _HOLDER_BYTES, 0)
            with log.open("ab") as stderr:
                self._process = subprocess.Popen(
                    guarded(sys.executable, *launch, str(spec)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    start_new_session=True,
                    cwd=cwd,
                    pass_fds=(lock,),
                )
            holder = f"{self._process.pid}@{socket.gethostname()}".ljust(_HOLDER_BYTES)
            os.pwrite(lock, holder.encode(), 0)
        finally:
            os.close(lock)  # from now on only the child and its own children hold the lock
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._log = log
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, stdout: IO[bytes]) -> None:
        with stdout:
            while line := stdout.readline(MAX_LINE):
                self._lines.put(line)

    def events(self, wait_s: float) -> list[dict[str, Any]]:
        """Messages that arrived, waiting up to `wait_s` for the first. Other output goes to the log."""
        messages: list[dict[str, Any]] = []
        try:
            line = self._lines.get(timeout=wait_s)
            while len(messages) < _BATCH:
                message = _message(line)
                if message is None:
                    with contextlib.suppress(OSError), self._log.open("ab") as log:  # a full disk ends no job
                        log.write(line)
                else:
                    messages.append(message)
                line = self._lines.get_nowait()
        except queue.Empty:
            pass
        return messages

    def exited(self) -> bool:
        """Whether it has ended; what is left of its group is then killed, before its number can be reused."""
        if self._process.returncode is not None:
            return True
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            return False
        self.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        return True

    @property
    def returncode(self) -> int:
        assert self._process.returncode is not None
        return self._process.returncode

    def terminate(self) -> None:
        """Ask it to write a checkpoint and stop. Only it: its own workers are its business."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once, unless it has ended."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what still runs, and wait for it."""
        if not self.exited():
            self.kill()
            while not self.exited():
                time.sleep(0.01)


def _message(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _take_folder(path: Path) -> int:
    """The run folder's lock. A process of an earlier attempt that still holds it, on this machine, is killed.

    Leases keep two workers from running one job while both make progress; the lock does so even if a worker
    was frozen for longer than its lease while its child ran on.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _wait_for(lambda: _lock_now(lock), 0.0):
        return lock
    holder = os.pread(lock, _HOLDER_BYTES, 0).decode(errors="replace").strip()
    number, _, host = holder.partition("@")
    if number.isdigit() and host == socket.gethostname():
        # Its group holds this very lock, so the number cannot have passed to another.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(int(number), signal.SIGKILL)
    if not _wait_for(lambda: _lock_now(lock), _TAKEOVER_S):
        os.close(lock)
        raise FolderBusy(f"an earlier attempt (process {holder or 'unknown'}) still runs in {path.parent}")
    return lock


def _lock_now(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def log_tail(log: Path, lines: int = 50, limit: int = 16_384) -> str:
    """The last lines of a job's log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            text = file.read(limit).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])

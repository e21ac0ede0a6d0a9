"""A test that hangs ends at its bound, in its own report: with the stacks of all threads and of its child processes.

The bound is pyproject's `timeout`, or that of the test's marker, and holds for its teardown once more. The children
that it started are ended, so that nothing waits for them and no port stays taken. Where even a signal does not reach
the main thread (a library waits in C, or holds the interpreter), the process ends `GRACE` seconds later, with the
stacks on its standard error; pytest-xdist then goes on with another one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import stat
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator

import psutil
import pytest

GRACE = 15  # seconds for the main thread to leave what it hangs in
PATIENCE = 3  # seconds for a child to write its stacks and end
LONGEST = 64 * 1024  # bytes of a child's last words

STARTED_BY = (
    "STARTED_BY_TEST"  # in the environment of a child: which test's it is, whatever becomes of its parents
)
HARNESS = ("/_pytest/", "/pluggy/", "/xdist/", "/execnet/", "<frozen runpy>")
os.environ["PYTHONFAULTHANDLER"] = "1"  # a child that is aborted says where all its threads are

_STDERR = os.dup(sys.__stderr__.fileno())  # as it is before pytest captures it


class Bound:
    """The time that a test has, from now on."""

    def __init__(self, item: pytest.Item, seconds: float, test: str = "") -> None:
        self.item, self.seconds = item, seconds
        self._told, self._all_told = "", threading.Event()
        self.test = os.environ[STARTED_BY] = test or uuid.uuid4().hex
        signal.signal(signal.SIGALRM, self._fail)
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(seconds + GRACE, file=_STDERR, exit=True)

    def lift(self) -> None:
        self._told = ""
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _expire(self) -> None:
        self._told = stacks()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        try:
            self._told += children_ended(self.test)  # a main thread that no signal woke may have waited for one
        finally:
            self._all_told.set()

    def _fail(self, *_: object) -> None:
        if self._told:
            self._all_told.wait()
            pytest.fail(f"{self.item.nodeid} was not done within {self.seconds:g} s\n{self._told}")


_bound = pytest.StashKey[Bound]()


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings) -> bool:
    item.stash[_bound] = Bound(item, settings.timeout)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    if _bound in item.stash:
        item.stash[_bound].lift()
    return True


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Pytest and pytest-timeout lift the bound of a test that failed, for a debugger; its teardown may hang as well."""
    if _bound in node.stash and not node.config.getoption("usepdb"):
        before = node.stash[_bound]
        node.stash[_bound] = Bound(node, before.seconds, before.test)


def stacks() -> str:
    """Where each thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            calls = [call for call in traceback.extract_stack(frame) if not _is_harness(call.filename)]
            told.append(f"---- thread {names.get(ident, ident)}\n{''.join(traceback.format_list(calls))}")
    return "\n".join(told)


def children_ended(test: str) -> str:
    """End the processes that the test started; their names and last words. Those of earlier tests are only named."""
    told = []
    for _ in range(3):  # what is watched over may be started anew
        own = [child for child, of in _children(test) if of in (test, None)]
        told += [_ended(child) for child in own]
        if not own:
            break
    return "\n".join([*told, *(f"---- left alone: {_described(child)}" for child, _ in _children(test))])


def _children(test: str) -> list[tuple[psutil.Process, str | None]]:
    """What this process started, with what these started, and whose each is; those whose parents are gone included."""
    own = psutil.Process()
    descendants, found = set(own.children(recursive=True)), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            of = process.environ().get(STARTED_BY)
            if process != own and _alive(process) and (process in descendants or of == test):
                found.append((process, of))
    return found


def _ended(child: psutil.Process) -> str:
    described = _described(child)
    with _last_words(child) as said, contextlib.suppress(psutil.Error):
        child.send_signal(signal.SIGABRT)
        until = time.monotonic() + PATIENCE
        while _alive(child) and time.monotonic() < until:
            time.sleep(0.02)
        child.kill()
    return f"---- child {described}\n{''.join(said)}"


@contextlib.contextmanager
def _last_words(child: psutil.Process) -> Iterator[list[str]]:
    """What a child writes to its standard error within, where that is a file or a pipe."""
    said: list[str] = []
    try:
        file = os.open(f"/proc/{child.pid}/fd/2", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        yield said
        return
    try:
        kind = os.fstat(file).st_mode
        if stat.S_ISREG(kind):
            os.lseek(file, 0, os.SEEK_END)
        yield said
        if stat.S_ISREG(kind) or stat.S_ISFIFO(kind):
            with contextlib.suppress(BlockingIOError):
                said.append(os.read(file, LONGEST).decode(errors="replace"))
    finally:
        os.close(file)


def _described(child: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{child.pid}: {' '.join(child.cmdline())[:500]}"
    return str(child.pid)


def _alive(child: psutil.Process) -> bool:
    try:
        return child.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_harness(file: str) -> bool:
    return any(part in file for part in HARNESS) or file.endswith("/pytest/__main__.py")

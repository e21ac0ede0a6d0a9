"""A test that hangs ends, in its own report: with the stacks of all threads and of its child processes.

It hangs when it and its children have done next to nothing for `IDLE` seconds; so a busy machine, on which all takes
many times as long, makes no test fail. One that goes on working has as long as pyproject's `timeout`, or its marker,
allows. The children that it started are ended, so that nothing waits for them and no port stays taken.

Where not even a signal reaches the main thread (a library waits in C, or holds the interpreter), the process ends
`GRACE` seconds later, with the stacks on its standard error; pytest-xdist then goes on with another one.
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

IDLE, NEXT_TO_NOTHING = (
    60.0,
    0.1,
)  # seconds; share of a core: a loop that polls takes less, a starved test more
LOOK = 5.0  # seconds between looks at what is being done
GRACE = 60  # seconds for the main thread to leave what it hangs in
PATIENCE = 3  # seconds for a child to write its stacks and end
LONGEST = 64 * 1024  # bytes of a child's last words

STARTED_BY = (
    "STARTED_BY_TEST"  # in the environment of a child: which test's it is, whatever becomes of its parents
)
HARNESS = ("/_pytest/", "/pluggy/", "/xdist/", "/execnet/", "<frozen runpy>")
os.environ["PYTHONFAULTHANDLER"] = "1"  # a child that is aborted says where all its threads are

_stderr = 2


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error as it is when nothing is captured."""
    global _stderr
    _stderr = os.dup(2)


class Bound:
    """The time that a test has, from now on."""

    def __init__(self, item: pytest.Item, limit: float, test: str = "") -> None:
        self.item, self.limit = item, limit
        self.test = os.environ[STARTED_BY] = test or uuid.uuid4().hex
        self._lifted, self._lock = threading.Event(), threading.Lock()
        self._told, self._all_told = "", threading.Event()
        signal.signal(signal.SIGALRM, self._fail)
        self._exit_in(IDLE + GRACE)
        threading.Thread(target=self._watch, name="hangs", daemon=True).start()

    def lift(self) -> None:
        with self._lock:
            self._lifted.set()
            faulthandler.cancel_dump_traceback_later()

    def _exit_in(self, seconds: float) -> None:
        with self._lock:
            if not self._lifted.is_set():
                faulthandler.dump_traceback_later(seconds, file=_stderr, exit=True)

    def _watch(self) -> None:
        began = active = seen = time.monotonic()
        done = 0.0
        how = ""
        while not how and not self._lifted.wait(min(LOOK, IDLE, self.limit)):
            self._exit_in(IDLE + GRACE)  # whoever holds the interpreter for so long holds this thread up too
            now, before, done = time.monotonic(), done, work_done()
            if done - before > NEXT_TO_NOTHING * (now - seen):
                active = now
            seen = now
            if now - active >= IDLE:
                how = f"did next to nothing for {now - active:.0f} s"
            elif now - began >= self.limit:
                how = f"was not done within {self.limit:g} s"
        if how:
            self._expire(how)

    def _expire(self, how: str) -> None:
        self._told = f"{self.item.nodeid} {how}\n{stacks()}"
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        try:
            self._told += children_ended(
                self.test
            )  # a main thread that no signal woke may have waited for one
        finally:
            self._all_told.set()
            self._exit_in(GRACE)

    def _fail(self, *_: object) -> None:
        if self._told and not self._lifted.is_set():
            self._all_told.wait()
            pytest.fail(self._told)


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
        before.lift()
        node.stash[_bound] = Bound(node, before.limit, before.test)


def work_done() -> float:
    """Seconds of processor time that this process and all that it started have taken."""
    total = 0.0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # its own, and those of its children that have ended
    return total


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

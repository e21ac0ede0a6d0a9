"""A hang ends at its bound and says where every thread and child process was; the tests after it are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers import REPOSITORY

CHILD = """
import threading, time
def the_child_waits():
    print("up", flush=True)
    time.sleep(300)
threading.Thread(target=the_child_waits).start()
"""
CONFTEST = """
import tests.hangs as hangs

pytest_plugins = ["tests.hangs"]
hangs.IDLE, hangs.NEXT_TO_NOTHING, hangs.LOOK, hangs.GRACE = 2.0, 0.02, 0.5, {grace}
"""
HANGING = """
import subprocess, sys, threading, time
import pytest

def another_thread_waits():
    time.sleep(300)

def test_threads_and_a_child_that_wait():
    threading.Thread(target=another_thread_waits, daemon=True).start()
    orphan = [sys.executable, "child.py"]
    shell = ["sh", "-c", '"$0" "$@" 2>orphan & echo $! >pid', *orphan]
    subprocess.run(shell, check=True)
    child = subprocess.Popen([sys.executable, "child.py"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    threading.Event().wait()

@pytest.fixture
def stuck():
    yield
    threading.Event().wait()

def test_that_fails_and_then_hangs_in_its_teardown(stuck):
    assert not "this"

@pytest.mark.timeout(2)
def test_that_works_for_ever():
    while True:
        pass

def test_that_works_for_longer_than_one_may_do_nothing():
    until = time.monotonic() + 3 * 2
    while time.monotonic() < until:
        pass
"""
HOLDS_THE_INTERPRETER = """
import ctypes

def test_that_no_signal_reaches():
    ctypes.PyDLL(None).sleep(300)
"""


def outcome(folder: Path, tests: str, *, grace: float) -> str:
    (folder / "test_it.py").write_text(tests)
    (folder / "child.py").write_text(CHILD)
    (folder / "conftest.py").write_text(CONFTEST.format(grace=grace))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "100",
        "test_it.py",
    ]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    summaries_are_one_line = {
        name: "" for name in ("CI", "BUILD_NUMBER")
    }  # by these pytest repeats all it said
    environment = {**os.environ, **summaries_are_one_line, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_hang_fails_with_all_stacks_and_none_of_its_children_is_left(tmp_path):
    said = outcome(tmp_path, HANGING, grace=40)
    assert "3 failed, 1 passed" in said
    assert ", 1 error" in said
    assert "test_threads_and_a_child_that_wait did next to nothing for" in said
    assert "test_that_works_for_ever was not done within 2 s" in said
    assert "in another_thread_waits" in said
    assert said.count("in the_child_waits") == 2
    assert not runs(int((tmp_path / "pid").read_text()))
    assert "ERROR test_it.py::test_that_fails_and_then_hangs_in_its_teardown" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PyDLL(None) has no sleep elsewhere")
def test_a_hang_that_no_signal_reaches_ends_the_process_with_its_stacks(tmp_path):
    said = outcome(tmp_path, HOLDS_THE_INTERPRETER, grace=1)
    assert "Timeout (0:00:03)!" in said
    assert "in test_that_no_signal_reaches" in said

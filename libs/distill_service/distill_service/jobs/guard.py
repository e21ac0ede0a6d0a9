"""Runs a program that dies with its parent: `python -m distill_service.jobs.guard PARENT_PID PROGRAM ARG…`.

The kernel kills it when the thread that started it ends, however that happens: no orphan holds a GPU.
A separate step, because code between fork and exec is not safe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then become the program."""
    parent, *program = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    os.execvp(program[0], program)


def guarded(*program: str) -> list[str]:
    """The command line that runs `program` under this guard, as a child of this process."""
    return [sys.executable, "-m", "distill_service.jobs.guard", str(os.getpid()), *program]


if __name__ == "__main__":
    main(sys.argv[1:])

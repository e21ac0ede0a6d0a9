"""The exception tree, and the one table of the codes that each class has at every edge.

DistilleryError
├── ConfigError     a recipe, a request field or a setting is wrong
├── DataError       data given by the user cannot be used
├── ArtifactError   a model on disk is damaged, of another kind, or refused
├── NotFound        a name that does not exist
├── Unavailable     a dependency (broker, database, server, GPU, package) is not there; trying later may help
├── Overloaded      a queue is full; carries after how many seconds to try again
└── DivergedError   a loss became non-finite: role, step, last finite checkpoint
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DISTRIBUTION = "distillery-kit"  # on an index; `distillery` there is somebody else's


class DistilleryError(Exception):
    """Base of all errors a user can act on. `str()` is one sentence; `field` names the offending input, if any."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(DistilleryError):
    pass


class DataError(DistilleryError):
    pass


class ArtifactError(DistilleryError):
    pass


class NotFound(DistilleryError):
    pass


class Unavailable(DistilleryError):
    pass


class Overloaded(DistilleryError):
    def __init__(self, message: str, *, retry_after_s: float, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


class DivergedError(DistilleryError):
    pass


class ErrorCodes(NamedTuple):
    """Codes of an error class at the edges: process exit code, gRPC status name, and whether the job is tried again."""

    exit_code: int
    grpc_status: str
    retry: bool


ERROR_CODES: dict[type[BaseException], ErrorCodes] = {
    ConfigError: ErrorCodes(2, "INVALID_ARGUMENT", False),
    DataError: ErrorCodes(65, "INVALID_ARGUMENT", False),
    ArtifactError: ErrorCodes(66, "FAILED_PRECONDITION", False),
    NotFound: ErrorCodes(67, "NOT_FOUND", False),
    Unavailable: ErrorCodes(75, "UNAVAILABLE", True),
    Overloaded: ErrorCodes(75, "RESOURCE_EXHAUSTED", True),
    DivergedError: ErrorCodes(68, "ABORTED", False),
    DistilleryError: ErrorCodes(1, "INTERNAL", False),
}
EXIT_OUT_OF_MEMORY = 70
EXIT_STOPPED = 143


def codes_of(error: BaseException) -> ErrorCodes:
    """The table's row for the nearest class of `error`; anything foreign is an INTERNAL error."""
    for cls in type(error).__mro__:
        if cls in ERROR_CODES:
            return ERROR_CODES[cls]
    return ERROR_CODES[DistilleryError]


def out_of_memory(error: BaseException) -> str | None:
    """The sentence for an error that says that memory, a host's or a GPU's, ran out; None for any other."""
    message = (str(error).splitlines() or [""])[0]
    hints = ("out of memory", "can't allocate memory", "cannot allocate memory")
    hinted = isinstance(error, RuntimeError) and any(hint in message.lower() for hint in hints)
    if not hinted and not isinstance(error, MemoryError):
        return None
    shown = f" ({message[:200]})" if message else ""
    return f"out of memory{shown}; lower batch_size or raise accumulate"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, else `; known: …`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""


def missing_package(package: str, extra: str) -> Unavailable:
    """The error for an optional package that is not installed."""
    return Unavailable(f"{package} is not installed; run: {install_command(extra)}")


def install_command(extra: str, *, source: Path | None = None) -> str:
    """The shell command that installs `extra` from where this code comes from, a clone or an index.

    `source` is the clone's folder, if there is one; by default the one that this file lies in.
    """
    clone = source or _clone()
    if clone is None:
        return f"pip install {shlex.quote(f'{DISTRIBUTION}[{extra}]')}"
    place = "." if clone == Path.cwd() else str(clone)
    return f"pip install -e {shlex.quote(f'{place}[{extra}]')}"


def _clone() -> Path | None:
    """The clone's root, three folders above this package; None where a wheel was installed."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "libs" / "distill_core").is_dir() else None

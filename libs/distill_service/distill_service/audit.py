"""Audit log of a server: one JSON line for each admin call, in the log and in a file that is only appended to."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import structlog

from distill_core.errors import ConfigError

TARGETS = ("model", "model_name", "id", "name")  # the fields of requests that say what they are about
MAX_TARGET_CHARS = 200
_log = structlog.get_logger("distillery.audit")


class AuditLog:
    """Records calls. Nothing of a request but the name of its target is kept, and nothing of its metadata.

    Raises:
        ConfigError: `file` cannot be written.
    """

    def __init__(self, file: Path | None = None) -> None:
        logging.getLogger("distillery.audit").setLevel(logging.INFO)  # also where the log keeps only warnings
        self._file = file
        if file is not None:
            try:
                self._append("")
            except OSError as error:
                raise ConfigError(
                    f"audit log {file} cannot be written: {error.strerror}; set DISTILLERY_AUDIT_LOG to a file "
                    "in a folder of this process, or to nothing",
                    field="audit_log",
                ) from None

    def record(self, *, who: str, method: str, target: str, outcome: str, request_id: str) -> None:
        """One call, when it has ended; `outcome` is its gRPC status."""
        line = {
            "who": who,
            "method": method.lstrip("/"),
            "target": target,
            "outcome": outcome,
            "request_id": request_id,
        }
        _log.info("audit", **line)
        if self._file is None:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self._append(json.dumps({"timestamp": stamp, "event": "audit", **line}) + "\n")
        except OSError as error:  # the call has been answered: only the log can say it
            _log.error("audit log cannot be written", file=str(self._file), error=str(error.strerror))

    def _append(self, line: str) -> None:
        """Opened anew for each line, so that a log that was rotated away is not written to."""
        assert self._file is not None
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def target_of(request: Any) -> str:
    """Subject of an admin request: a model, a job's id or a name; empty if it names nothing."""
    known = request.DESCRIPTOR.fields_by_name
    for field in TARGETS:
        if field in known and (value := getattr(request, field)):
            return str(value)[:MAX_TARGET_CHARS]
    return ""

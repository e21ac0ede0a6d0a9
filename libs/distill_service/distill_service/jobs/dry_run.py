"""Dry runs: a process of its own looks at recipe, data and memory, so that the server loads no model library."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_core import errors
from distill_core.errors import EXIT_OUT_OF_MEMORY, ConfigError, DistilleryError, Overloaded, Unavailable
from distill_service.jobs.guard import guarded
from distill_service.jobs.specs import Draft, references
from distill_service.settings import Settings

TIME_LIMIT_S = 300.0
_WAITING = 8  # dry runs; each is a process that loads a model library, so they run one after the other
_MAX_LINE = 1 << 20
_TAIL = 2000  # characters of what the process logged


class DryRuns:
    """Looks at what would be queued, one request at a time."""

    def __init__(self, settings: Settings, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._settings, self._time_limit_s = settings, time_limit_s
        self._turn = asyncio.Lock()
        self._asked = 0

    async def plans(self, drafts: Sequence[Draft]) -> list[dict[str, Any]]:
        """Needs of each job: name, kind, note, and of a training memory_bytes, standing_bytes, device, fits.

        Raises:
            DistilleryError: the first job that could not succeed. Overloaded: too many ask at once.
        """
        if self._asked >= _WAITING:
            raise Overloaded("too many dry runs at once; try again", retry_after_s=30)
        self._asked += 1
        try:
            async with self._turn:
                with tempfile.TemporaryDirectory(prefix="distillery-dry-run-") as folder:
                    return await self._look(drafts, Path(folder))
        finally:
            self._asked -= 1

    async def _look(self, drafts: Sequence[Draft], folder: Path) -> list[dict[str, Any]]:
        spec = folder / "spec.json"
        spec.write_text(json.dumps(self._spec(drafts, folder)), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *guarded(sys.executable, "-m", "distill_core.job.entry", str(spec)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=_MAX_LINE,
        )
        try:
            async with asyncio.timeout(self._time_limit_s):
                out, log = await process.communicate()
        except TimeoutError:
            raise Unavailable(
                f"the dry run took longer than {self._time_limit_s:.0f} s; ask for fewer jobs, or submit without one"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also where the caller left
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        return _heard(out, log, process.returncode or 0)

    def _spec(self, drafts: Sequence[Draft], folder: Path) -> dict[str, Any]:
        jobs = [
            {"name": d.stage or d.name, "kind": d.kind, "spec": d.spec, "waits_for": references(d.spec)}
            for d in drafts
        ]
        where = {"store": self._settings.store_url, "cache": str(self._settings.cache_dir)}
        roots = self._settings.readable_roots()
        readable = None if roots is None else [str(root) for root in roots]
        return {"kind": "dry-run", "jobs": jobs, "run_dir": str(folder), "roots": readable, **where}


def _heard(out: bytes, log: bytes, code: int) -> list[dict[str, Any]]:
    """The plans that a process told, or the error that it ended with."""
    messages = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
    error = next((message for message in messages if message["event"] == "error"), None)
    if error is not None and code != EXIT_OUT_OF_MEMORY:
        kind = getattr(errors, str(error["type"]), ConfigError if code == 2 else DistilleryError)
        raise kind(str(error["message"]), field=error.get("field"))
    if code:
        last = " ".join(log.decode(errors="replace")[-_TAIL:].splitlines()[-1:])
        raise Unavailable(
            f"the dry run ended with exit code {code} ({last or 'it logged nothing'}); this machine may lack memory"
        )
    return [message for message in messages if message["event"] == "plan"]

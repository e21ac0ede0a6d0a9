"""One job in several processes of this machine: `python -m distill_core.job.launch COUNT MODULE SPEC.json`.

torchrun gives its ranks 30 s after a SIGTERM and ends with 1 whatever they ended with; a job's grace and exit code are
promises (`errors.ERROR_CODES`), which this keeps. The rest is torchrun's way: the ranks meet at a store that the
launcher holds, on a port that the system chose. What the recipe needs first is made before they start, by one process.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distill_core.errors import ERROR_CODES, EXIT_STOPPED, ConfigError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_LAST_WORDS_S = 5.0  # for the other ranks, once one has failed: they wait for it in a collective


class Launcher:
    """Starts processes, hands SIGTERM on to them, and ends with the exit code that tells most."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        for process in self._running:
            process.send_signal(signal.SIGTERM)

    def run(self, module: str, spec: Path, ranks: list[dict[str, str]]) -> int:
        """Run `module` once for each table of variables; only the first one's output is heard."""
        if self._stopping:
            return EXIT_STOPPED
        for rank, variables in enumerate(ranks):
            command = [
                sys.executable,
                "-m",
                "distill_core.job.launch",
                "--rank",
                str(os.getpid()),
                module,
                str(spec),
            ]
            process = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                close_fds=False,  # the run folder's lock is held as long as any of them lives
            )
            self._running.append(process)
            if self._stopping:
                process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        failed_at: float | None = None
        while any(process.poll() is None for process in self._running):
            polled = [process.poll() for process in self._running]
            if failed_at is None and any(code not in (None, 0, EXIT_STOPPED) for code in polled):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _LAST_WORDS_S:
                for process in self._running:
                    process.kill()
            time.sleep(_POLL_S)
        codes = [process.returncode for process in self._running]
        self._running.clear()
        return worst(codes, killed_by_us=failed_at is not None)


def worst(codes: list[int], *, killed_by_us: bool = False) -> int:
    """The exit code of a group: a signal's first (the others fail because of it), then an error's, then 143, then 0."""
    signals = [code for code in codes if code < 0]
    errors = [code for code in codes if code > 0 and code != EXIT_STOPPED]
    if killed_by_us and errors:
        signals = [code for code in signals if code != -signal.SIGKILL]  # ours, of those that waited
    if signals:
        return 128 - signals[0]
    return errors[0] if errors else max(codes)


def main(arguments: list[str]) -> int:
    """Run a job in COUNT processes; its exit code."""
    if arguments[0] == "--rank":
        return _as_rank(int(arguments[1]), arguments[2], arguments[3])
    count, module, spec = int(arguments[0]), arguments[1], Path(arguments[2])
    launcher = Launcher()
    if _needs_models_first(json.loads(spec.read_text(encoding="utf-8"))):
        code = launcher.run(module, _preparation(spec), [{}])
        if code:
            return code
    try:
        store, variables = _meeting_place(count)
    except ConfigError as error:
        event = {"event": "error", "type": "ConfigError", "message": str(error), "field": error.field}
        print(json.dumps(event), flush=True)
        return ERROR_CODES[ConfigError].exit_code
    code = launcher.run(module, spec, variables)
    del store  # the ranks met there until now
    return code


def _as_rank(parent: int, module: str, spec: str) -> int:
    """Become the job's program in a process that dies with the launcher.

    It leaves without Python's finalization: a thread of gloo that frees its last message then aborts the process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return 1
    sys.argv = [module, spec]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _needs_models_first(task: dict[str, Any]) -> bool:
    """Whether the recipe names models by recipes of theirs, which are trained once, by one process."""
    return '"recipe":' in json.dumps(task["spec"]["recipe"]) or bool(task["spec"]["recipe"].get("pairs"))


def _preparation(spec: Path) -> Path:
    task = json.loads(spec.read_text(encoding="utf-8"))
    path = spec.with_name("prepare.json")
    path.write_text(json.dumps({**task, "kind": "prepare"}), encoding="utf-8")
    return path


def _meeting_place(count: int) -> tuple[object, list[dict[str, str]]]:
    """A store for the ranks to meet at, which lives as long as it is held, and each rank's variables."""
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise ConfigError(
            f"processes = {count} needs as many GPUs and this worker sees {gpus}; lower processes, or run the "
            "queue train.multi on a worker that owns more",
            field="processes",
        )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **({} if gpus else {"ACCELERATE_USE_CPU": "true"}),
    }
    return store, [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

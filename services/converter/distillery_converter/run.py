"""The job process: `python -m distillery_converter.run SPEC.json` converts, and says how in JSON lines.

Exit codes are those of `distill_core.job.entry`. A stopped conversion keeps nothing and publishes nothing.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_core.errors import EXIT_STOPPED
from distill_core.job.entry import main

Tell = Callable[[dict[str, Any]], None]


def run(spec: dict[str, Any], tell: Tell, _stop: Callable[[], bool]) -> int:
    """Convert as `spec` says; the exit code."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED)
    )  # at once: there is no checkpoint to write
    from distill_core.artifacts import ArtifactStore
    from distillery_converter.convert import convert

    run_dir, values = Path(spec["run_dir"]), spec["spec"]
    manifest = convert(
        ArtifactStore(spec["store"]),
        values["artifact"],
        values["target"],
        tolerance=values.get("tolerance"),
        job=spec["job"],
        work=_emptied(run_dir / "work"),
        cache=Path(spec.get("cache") or run_dir / "cache"),
        on_progress=_progress(tell),
    )
    report = manifest.exports[values["target"]]
    figures = {**report.figures, "tolerance": report.tolerance, "seconds": report.seconds}
    result = {"artifact": manifest.ref, "metrics": figures}
    (run_dir / "result.json").write_text(json.dumps(result), encoding="utf-8")
    tell({"event": "result", **result})
    return 0


def _emptied(folder: Path) -> Path:
    """The folder without what a killed attempt left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _progress(tell: Tell) -> Callable[[int, int], None]:
    started = time.perf_counter()

    def report(step: int, steps: int) -> None:
        rate = step / max(time.perf_counter() - started, 1e-6)
        left = (steps - step) / rate if rate else 0.0
        tell({"event": "progress", "step": step, "steps": steps, "rate": rate, "eta_s": left})

    return report


if __name__ == "__main__":
    sys.exit(main(run=run))

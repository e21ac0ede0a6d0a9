"""The job process: `python -m distill_core.job.entry SPEC.json` trains or evaluates and tells its parent in JSON lines.

Exit codes: 0 done, 143 stopped on request with a checkpoint written, 70 out of memory, else errors.ERROR_CODES.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_core.errors import EXIT_OUT_OF_MEMORY, EXIT_STOPPED, DistilleryError, codes_of, out_of_memory
from distill_core.library_bars import hide_library_bars

Job = Callable[[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], bool]], int]


def main(argv: list[str] | None = None, *, run: Job | None = None) -> int:
    """Run the job that SPEC.json describes; the exit code. Another service's jobs pass their own `run`."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    hide_library_bars()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log: stdout carries events alone

    def tell(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")

    stop = _StopFlag()
    try:
        spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        return (run or _run)(spec, tell, stop)
    except DistilleryError as error:
        tell({"event": "error", "type": type(error).__name__, "message": str(error), "field": error.field})
        return codes_of(error).exit_code
    except OSError as error:
        logging.exception("the job failed")
        tell(
            {
                "event": "error",
                "type": "Unavailable",
                "message": f"{error.strerror or error}: {error.filename or ''}",
            }
        )
        return 75
    except Exception as error:
        logging.exception("the job failed")
        message = out_of_memory(error)
        if message is not None:
            tell({"event": "error", "type": "MemoryError", "message": message})
            return EXIT_OUT_OF_MEMORY
        name, reason = type(error).__name__, (str(error).splitlines() or ["no message"])[0]
        tell({"event": "error", "type": name, "message": f"internal error: {name}: {reason}"})
        return 1


class _StopFlag:
    """True once SIGTERM arrived; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.set = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.set = True

    def __call__(self) -> bool:
        return self.set


def _run(spec: dict[str, Any], tell: Any, stop: _StopFlag) -> int:
    if spec["kind"] == "dry-run":
        from distill_core.job.dry_run import dry_run

        return dry_run(spec, tell)
    from distill_core import api  # after the signal handler: importing torch takes seconds
    from distill_core.recipe import Recipe
    from distill_core.recipe.references import check_job

    run_dir = Path(spec["run_dir"])
    context = api.context(spec["store"], Path(spec.get("cache") or run_dir / "cache"))
    check_job(spec["spec"], spec.get("roots"), context.store)
    if spec["kind"] == "prepare":
        prepared = api.prepare(Recipe.parse(spec["spec"]["recipe"]), context, listener=tell, should_stop=stop)
        return 0 if prepared else EXIT_STOPPED
    if spec["kind"] == "evaluate":
        values = spec["spec"]
        table = values.get("evaluate", {})
        figures, measured_with = api.evaluate(values["artifact"], table, values.get("data"), context)
        artifact = values["artifact"]
    else:
        recipe = Recipe.parse(spec["spec"]["recipe"])
        result = api.train(recipe, run_dir, context, listener=tell, should_stop=stop, job=spec["job"])
        if result.stopped:
            return EXIT_STOPPED
        if not result.main:
            return 0
        figures, measured_with = result.figures, result.measured_with
        artifact = result.manifest.ref if result.manifest else ""
    (run_dir / "result.json").write_text(
        json.dumps({"artifact": artifact, "metrics": figures, "measured_with": measured_with}),
        encoding="utf-8",
    )
    tell({"event": "result", "artifact": artifact, "metrics": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The converter service: `python -m distillery_converter.worker` runs the jobs of the queue `convert`.

The worker itself loads no model library; each job is a process of its own (`distillery_converter.run`).
"""

from __future__ import annotations

import sys

from distill_core.errors import DistilleryError, codes_of
from distill_service.jobs.worker import run_worker
from distill_service.settings import of_a_folder, settings


def main() -> int:
    """Work until told to stop; the exit code."""
    try:
        values = settings()
        return run_worker(
            ["convert"],
            values,
            commands={"convert": "distillery_converter.run"},
            service="converter",
            metrics_port="converter_metrics_port",
        )
    except (DistilleryError, OSError) as error:
        failure = of_a_folder(error)
        print(f"error: {failure}", file=sys.stderr)
        return codes_of(failure).exit_code


if __name__ == "__main__":
    sys.exit(main())

"""A worker process: `python -m distillery_trainer.worker [--once] [QUEUE…]`; by default all queues of trainings.

Beside workers that own one GPU each, give these the queues `train eval`, and `train.multi` to the one that owns all.
With `--once` it runs one job, if one waits, and ends: for a batch system that starts a process for each.
"""

from __future__ import annotations

import sys

from distill_core.errors import ConfigError, DistilleryError, codes_of, nearest
from distill_service.jobs.once import run_once
from distill_service.jobs.table import MULTI, QUEUE_NAMES
from distill_service.jobs.worker import run_worker
from distill_service.settings import of_a_folder, settings

DEFAULT_QUEUES = ("train", MULTI, "eval")


def main(arguments: list[str]) -> int:
    """Run jobs until SIGTERM; returns the exit code."""
    once, named = "--once" in arguments, [argument for argument in arguments if argument != "--once"]
    try:
        for name in named:
            if name not in QUEUE_NAMES:
                raise ConfigError(f"no queue is called {name!r}{nearest(name, QUEUE_NAMES)}")
        values = settings()
        queues = named or DEFAULT_QUEUES
        if once:
            return run_once(queues, values, service="trainer")
        return run_worker(queues, values, service="trainer")
    except (DistilleryError, OSError) as error:
        failure = of_a_folder(error)
        print(f"error: {failure}", file=sys.stderr)
        return codes_of(failure).exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

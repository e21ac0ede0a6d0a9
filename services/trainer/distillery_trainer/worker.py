"""A worker process: `python -m distillery_trainer.worker [QUEUE…]`, by default for `train` and `eval`."""

from __future__ import annotations

import sys

from distill_core.errors import ConfigError, DistilleryError, meaning, nearest
from distill_service.jobs.table import QUEUES
from distill_service.jobs.worker import run_worker
from distill_service.settings import settings

DEFAULT_QUEUES = ("train", "eval")


def main(arguments: list[str]) -> int:
    """Run jobs until SIGTERM; returns the exit code."""
    known = [queue for queue in QUEUES.values() if queue]
    try:
        for name in arguments:
            if name not in known:
                raise ConfigError(f"no queue is called {name!r}{nearest(name, known)}")
        values = settings()
        queues = arguments or DEFAULT_QUEUES
        return run_worker(queues, values, service="trainer")
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return meaning(error).exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A worker as the services run it, whose jobs are witnessed: `python -m tests.chaos.worker QUEUE…`."""

from __future__ import annotations

import sys

from distill_service.jobs.supervisor import COMMANDS
from distill_service.jobs.worker import run_worker
from distill_service.settings import settings

if __name__ == "__main__":
    sys.exit(run_worker(sys.argv[1:], settings(), commands=dict.fromkeys(COMMANDS, "tests.chaos.child")))

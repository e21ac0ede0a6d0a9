"""A worker process as a service runs it, with the tests' own job program: `python jobs_worker.py QUEUE…`."""

import sys

from distill_service.jobs.worker import run_worker
from distill_service.settings import settings

COMMANDS = dict.fromkeys(("train", "evaluate", "convert"), "jobs_child")

if __name__ == "__main__":
    code = run_worker(sys.argv[1:], settings(), commands=COMMANDS)
    assert "torch" not in sys.modules
    sys.exit(code)

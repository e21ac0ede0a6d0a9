"""A job's process under witness: the product's own program, signed. `python -m tests.chaos.child SPEC.json`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from distill_service.jobs.supervisor import COMMANDS
from tests.chaos.witness import Signature


def main() -> int:
    """Run the job; its program's exit code."""
    task = json.loads(Path(sys.argv[1]).read_text())
    with Signature(task):
        program = importlib.import_module("distill_core.job.entry")
        if task["kind"] != "convert":
            return int(program.main())
        return int(program.main(run=importlib.import_module(COMMANDS["convert"]).run))


if __name__ == "__main__":
    sys.exit(main())

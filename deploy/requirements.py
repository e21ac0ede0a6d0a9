"""Print what extras of pyproject.toml require: `python deploy/requirements.py trainer cli -torch`.

Images install these first, so that a change of our code does not install them again. `-NAME` leaves a package
out, e.g. torch in an image that only runs ONNX. Standard library only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str], without: set[str]) -> list[str]:
    """The project's own requirements and those of `extras`, nested extras resolved, sorted."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    own = re.compile(rf"{re.escape(project['name'])}\[(.+)\]")
    known, found, waiting = project["optional-dependencies"], set(project["dependencies"]), list(extras)
    while waiting:
        extra = waiting.pop()
        if extra not in known:
            sys.exit(f"pyproject.toml has no extra {extra!r}; it has {', '.join(sorted(known))}")
        for line in known[extra]:
            nested = own.fullmatch(line)
            waiting += nested[1].split(",") if nested else []
            found |= set() if nested else {line}
    return sorted(line for line in found if re.split(r"[^A-Za-z0-9_.-]", line)[0] not in without)


if __name__ == "__main__":
    leave_out = {argument[1:] for argument in sys.argv[1:] if argument.startswith("-")}
    chosen = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    print("\n".join(requirements(chosen, leave_out)))

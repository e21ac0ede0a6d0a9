"""docs/security.md names a test for every line, the tests exist, and the audits that need no network are clean."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.helpers import REPOSITORY

PAGE = (REPOSITORY / "docs" / "security.md").read_text()
TABLE = PAGE.partition("## Threats")[2].partition("\n## ")[0]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[2].strip()[:50])
def test_every_threat_names_a_test_that_exists(row):
    assert len(row.strip("|").split("|")) == 4
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named, "this line names no test"
    for file, test in named:
        text = (REPOSITORY / file).read_text()
        assert re.search(rf"^(async )?def {test}\(", text, re.M), f"{file} has no {test}"


def test_the_page_speaks_of_every_subject():
    subjects = set(re.findall(r"^\| \*\*([\w ]+)\*\*", TABLE, re.M))
    assert subjects >= {
        "who submits",
        "paths",
        "code",
        "sizes",
        "secrets",
        "store",
        "containers",
        "supply chain",
    }
    assert len(ROWS) > 40


def test_every_named_package_is_pinned():
    """What the extras of one environment name; those for GPUs alone bring their own builds."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    apart = ("onnx-gpu", "trt")
    lines = [
        line for name, lines in extras["optional-dependencies"].items() if name not in apart for line in lines
    ]
    names = {plain(re.split(r"[\[<>=;! ]", line)[0]) for line in (*lines, *extras["dependencies"])}
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in pins)
    pinned = {plain(line.partition("==")[0]) for line in pins}
    assert names - {"distillery-kit", "triton"} <= pinned  # triton comes with the torch of a GPU


def test_bandit_finds_nothing():
    command = [
        sys.executable,
        "-m",
        "bandit",
        "-q",
        "-c",
        "pyproject.toml",
        "-r",
        "libs",
        "services",
        "deploy",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bandit_would_notice_a_shell(tmp_path):
    (tmp_path / "bad.py").write_text("import subprocess\nsubprocess.call('ls ' + input(), shell=True)\n")
    command = [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", str(tmp_path / "bad.py")]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 1


def test_make_audit_runs_both():
    makefile = (REPOSITORY / "Makefile").read_text()
    recipe = makefile.partition("\naudit: setup\n")[2].partition("\n\n")[0]
    assert "bandit" in recipe
    assert "pip-audit --strict" in recipe

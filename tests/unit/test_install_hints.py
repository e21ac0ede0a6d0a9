"""Hints to install an extra fetch nobody else's package."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distill_core.errors import DISTRIBUTION, install_command, missing_package

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_in_a_clone_the_clone_is_installed_from_wherever_the_shell_is(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert str(missing_package("TensorRT", "trt")).endswith("run: pip install -e '.[trt]'")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install_command("trt")) == ["pip", "install", "-e", f"{ROOT}[trt]"]
    assert shlex.split(install_command("trt", source=Path("/a b/it's")))[-1] == "/a b/it's[trt]"


def test_without_a_clone_the_distribution_is_named(tmp_path):
    installed = tmp_path / "lib" / "python3" / "site-packages"
    shutil.copytree(
        ROOT / "libs/distill_core/distill_core", installed / "distill_core", ignore=lambda *_: ["recipes"]
    )
    code = "from distill_core.errors import install_command; print(install_command('trt'))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(installed)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert said.strip() == "pip install 'distillery-kit[trt]'"


def test_the_project_refers_to_itself_by_the_name_of_its_distribution():
    assert PROJECT["name"] == DISTRIBUTION
    assert list(PROJECT["scripts"]) == ["distillery"]
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    nested = [line for line in lines if line.startswith("distillery")]
    assert nested
    for line in nested:
        name, extras = re.fullmatch(r"(.+)\[(.+)\]", line).groups()
        assert name == DISTRIBUTION
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_every_extra_that_the_code_names_exists():
    named = re.compile(r"(?:missing_package\([^()]*, |install_command\()['\"](\w[\w-]*)['\"]")
    sources = [path for folder in ("libs", "services") for path in (ROOT / folder).rglob("*.py")]
    found = {extra for path in sources for extra in named.findall(path.read_text(encoding="utf-8"))}
    assert {"trt", "otel", "viewer"} <= found <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("suffix", [".py", ".md", ".toml", "Dockerfile", ".yml"])
def test_no_page_and_no_code_tells_to_install_what_is_another_project_on_the_index(suffix):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name.endswith(suffix) and name not in ("CHANGELOG.md", "tests/unit/test_install_hints.py"):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"\bdistillery\[(?!_)|pip install ['\"]?distillery['\"\s]", text), name

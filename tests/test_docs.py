"""The site of the pages: it builds without a broken link, and holds every public docstring."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
CORE = REPOSITORY / "libs/distill_core"
CLIENTS = {
    "distillery_sampler": REPOSITORY / "services/sampler/distillery_sampler/client",
    "distillery_trainer": REPOSITORY / "services/trainer/distillery_trainer/client.py",
}


def build(site: Path, config: Path = REPOSITORY / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def documented(path: Path, module: str) -> Iterator[str]:
    """The names of all public things of a module that have a docstring, the module's own first."""

    def within(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
        if ast.get_docstring(node):
            yield name
        for inner in node.body:
            if not isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if inner.name.startswith("_"):
                continue
            if isinstance(inner, ast.ClassDef):
                yield from within(inner, f"{name}.{inner.name}")
            elif ast.get_docstring(inner):
                yield f"{name}.{inner.name}"

    yield from within(ast.parse(path.read_text(encoding="utf-8")), module)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_site_has_every_page_and_every_public_docstring(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'href="serving/"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "api").rglob("index.html"))
    shown = set(re.findall(r'id="(distill[\w.]+)"', pages))
    wanted = {
        name
        for path in sorted((CORE / "distill_core").rglob("*.py"))
        if not any(part.startswith("_") and part != "__init__.py" for part in path.relative_to(CORE).parts)
        for name in documented(path, module_name(path, CORE))
    }
    assert len(wanted) > 1000
    assert sorted(wanted - shown) == []
    sampler = {
        f"distillery_sampler.client.{name}"
        for name in ("SamplerClient.generate", "AsyncSamplerClient.render")
    }
    assert sampler <= shown
    assert set(documented(CLIENTS["distillery_trainer"], "distillery_trainer.client")) <= shown


@pytest.mark.parametrize(
    "link", ["[x](nowhere.md)", "[x](../libs/nowhere.py)", "![x](images/nowhere.png)", "[x](index.md#no)"]
)
def test_a_broken_link_fails_the_build(link, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(f"# Page\n\n{link}\n", encoding="utf-8")
    (tmp_path / "docs/index.md").write_text("# First\n", encoding="utf-8")
    hook = REPOSITORY / "docs/site_pages.py"
    (tmp_path / "hook.py").write_text(hook.read_text(encoding="utf-8").replace("def on_files", "def unused"))
    settings = f"INHERIT: {REPOSITORY / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: [hook.py]\nplugins: []\n"
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert link.partition("(")[2].strip(")").rpartition("/")[2].partition("#")[0] in done.stdout + done.stderr

"""Pages of the site beside those of docs/: the READMEs, and a page of docstrings for each package and client."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
PAGES |= {f"services/{name}/README.md": f"services/{name}.md" for name in ("trainer", "converter", "sampler")}
PACKAGE = ROOT / "libs/distill_core/distill_core"
CLIENTS = ("distillery_sampler.client", "distillery_trainer.client")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!https?://)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, modules in packages().items():
        files.append(File.generated(config, f"api/{name}.md", content=docstrings(name, modules)))
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    titles = [path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in decisions]
    listed = "\n".join(f"- [{title}]({path.name})" for title, path in zip(titles, decisions, strict=True))
    files.append(File.generated(config, "decisions/index.md", content=f"# Decisions\n\n{listed}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links and pictures as they lie in the site; a file of the source has no page, so its path is shown."""
    here = next(
        (source for source, place in PAGES.items() if place == page.file.src_uri), f"docs/{page.file.src_uri}"
    )
    start = posixpath.dirname(page.file.src_uri)

    def to(target: str) -> str | None:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / path).exists() and not path.startswith("docs/"):
            return target  # strict: reported as broken
        place = (
            "decisions/index.md" if path == "docs/decisions" else PAGES.get(path, path.removeprefix("docs/"))
        )
        return posixpath.relpath(place, start or ".") if place != path or path in PAGES else None

    def link(found: re.Match[str]) -> str:
        place = to(found[2])
        return f"{found[1]} (`{found[2]}`)" if place is None else f"[{found[1]}]({place}{found[3] or ''})"

    if page.file.src_uri.startswith("api/"):
        return markdown
    return PICTURE.sub(lambda found: f"{found[1]}{to(found[2])})", LINK.sub(link, markdown))


def packages() -> dict[str, list[str]]:
    """The public modules by package: those of distill_core itself, each of its packages, and the clients."""
    found: dict[str, list[str]] = {"distill_core": []}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(name.startswith("_") for name in names):
            package = (
                ".".join(names[:2])
                if (PACKAGE / names[1] if len(names) > 1 else PACKAGE / "x").is_dir()
                else names[0]
            )
            found.setdefault(package, []).append(".".join(names))
    return found | {client: [client] for client in CLIENTS}


def docstrings(name: str, modules: list[str]) -> str:
    """A page of mkdocstrings."""
    return f"# `{name}`\n\n" + "\n".join(f"::: {module}\n" for module in modules)

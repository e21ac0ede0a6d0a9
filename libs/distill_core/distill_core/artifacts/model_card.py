"""The model card of a version: README.md, as hubs show it. Imports no torch.

All that users or foreign files said is data here: quoted in the front matter, escaped in the text.
"""

from __future__ import annotations

import json
import re

from distill_core.artifacts.manifest import Manifest

CARD = "README.md"
USAGE = "## Use in diffusers"  # the section that a saved model brings along


def model_card(manifest: Manifest, saved: str = "") -> str:
    """The card of a version; `saved` is what its folder said of its use when the model was saved."""
    facts = [
        ("Version", manifest.ref),
        ("Kind", manifest.kind),
        ("Method", manifest.method),
        ("Paper", manifest.paper),
        ("Made from", ", ".join(manifest.parents)),
        ("Base", _base(manifest)),
        ("Licence", manifest.licence or "none was chosen"),
    ]
    lines = [f"- {name}: {escaped(value)}" for name, value in facts if value]
    head = [
        "---",
        *front_matter(manifest, library="diffusers" if USAGE in saved else ""),
        "---",
        "",
        f"# {escaped(manifest.title or manifest.name)}",
        "",
        *lines,
    ]
    start = saved.find(USAGE)
    section = saved[start:].strip() if start >= 0 else ""
    return "\n".join([*head, "", section]).rstrip() + "\n"


def front_matter(manifest: Manifest, *, library: str) -> list[str]:
    """YAML, line by line; JSON's strings are YAML's. `library` is the one that the section of use is for."""
    entries = {
        "license": manifest.licence.lower(),
        "library_name": library,
        "base_model": _base(manifest),
        "tags": ["distillery", *([manifest.method] if manifest.method else [])],
    }
    return [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value]


def _base(manifest: Manifest) -> str:
    """The model that a LoRA student adapts."""
    return str(manifest.card.get("base") or "")


def escaped(text: str) -> str:
    """One line of Markdown that shows `text` as it is."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:-])", r"\\\1", line)

"""`pipelines`: pictures of every text-to-image network beside its pipeline's own; the table of docs/pipelines.md."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_core.errors import ConfigError
from distillery_cli.terminal.output import AsJson, emit_json, markdown_table, results, table

KEPT, PAGE = Path("docs/pipelines.json"), Path("docs/pipelines.md")
HEAD = """# Pipelines

Text-to-image pipelines that are read as they are, and how near their pictures come to those of diffusers' own pipeline:
the peak signal-to-noise ratio in dB, in float32, at the same latents, steps, guidance, prompt and negative prompt. Each
was measured on a tiny pipeline of the class with random weights; pictures of another prompt are within {other:.0f} dB.
60 dB are a quarter of a grey level of 8 bits, as root mean square.

"""
FOOT = """
- **teacher**: this library's sampler in Python.
- **student**: a one-step student's folder, opened in plain diffusers by the code of its card, beside this library.
- **torch**, **ONNX**: what the sampler service answers, from the weights and from the exported graphs.
- **LoRA**: a published adapter, loaded by the pipeline's `load_lora_weights`, beside this library.

– is a form that the pipeline has no method for, or that was not measured.

Written by `python -m tools pipelines`; do not edit.
"""
COLUMNS = ("teacher", "student", "torch", "onnx", "lora")
TITLES = ("network", "pipeline", "teacher", "student", "torch", "ONNX", "LoRA")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Example: python -m tools pipelines --only flux,sana")(pipelines)


def pipelines(
    only: Annotated[str, typer.Option(help="Rows to measure anew; all without it.")] = "",
    graphs: Annotated[bool, typer.Option(help="Convert them too, which takes minutes each.")] = True,
    repository: Annotated[Path, typer.Option(help="The checkout whose page is written.")] = Path(),
    as_json: AsJson = False,
) -> int:
    """Measure every pipeline on a tiny one of its class, some minutes each, and write docs/pipelines.md."""
    from tests.tiny_pipelines import BUILDERS

    chosen = [name.strip() for name in only.split(",") if name.strip()] or list(BUILDERS)
    if unknown := set(chosen) - BUILDERS.keys():
        raise ConfigError(
            f"no pipeline is called {', '.join(sorted(unknown))}; choose from {', '.join(BUILDERS)}",
            field="only",
        )
    for name in chosen:
        row, rows = measured(name, graphs), kept(repository)  # read late: several may be measured at once
        rows[name] = {**rows.get(name, {}), **row}
        ordered = {each: rows[each] for each in BUILDERS if each in rows}
        (repository / KEPT).write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        (repository / PAGE).write_text(page(ordered), encoding="utf-8")
    found = {name: row for name, row in kept(repository).items() if name in chosen}
    if as_json:
        emit_json(found)
    else:
        results.print(table(list(TITLES), [cells(row) for row in found.values()], title="dB"))
    return 0


def kept(repository: Path) -> dict[str, dict[str, Any]]:
    """The rows that were measured, by the name of their tiny pipeline."""
    file = repository / KEPT
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return rows


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of these rows."""
    other = max(row["other_prompt"] for row in rows.values())
    body = markdown_table(list(TITLES), [cells(row) for row in rows.values()])
    return HEAD.format(other=other) + body + FOOT


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as the table shows it."""
    figures = [row.get(column) for column in COLUMNS]
    shown = ["–" if figure is None else f"{figure:.0f}" for figure in figures]
    return [row["network"], row["pipeline"], *shown]


def measured(name: str, graphs: bool) -> dict[str, Any]:
    """The row of a tiny pipeline: figures in dB, None where a form does not exist; of graphs only if so asked."""
    from tests.pipeline_rows import measured_row

    with tempfile.TemporaryDirectory(prefix="distillery-pipelines-") as scratch:
        return measured_row(name, Path(scratch), graphs=graphs)

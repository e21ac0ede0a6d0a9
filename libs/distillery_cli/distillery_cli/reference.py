"""`distillery reference`: what every key, option, setting and figure means, on the screen and as pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_core.errors import NotFound, nearest
from distillery_cli.terminal.output import AsJson, emit_json, markdown_table, results, styled, table, waiting

if TYPE_CHECKING:
    from distill_core.reference import Key, Table

COLUMNS = ["key", "type", "default", "allowed", "meaning"]
SHORT = ("data", "config", "network", "evaluate")  # in a recipe the name after these is said elsewhere
INTRODUCTION = (
    "Written by `distillery reference --write docs/reference` from the classes; not edited by hand."
)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery reference  ·  distillery reference data.images  ·  distillery reference lr"
        "  ·  distillery reference settings"
    )(reference)


def reference(
    path: Annotated[
        str | None,
        typer.Argument(help="A table, key, setting or figure; without it, the tables that there are."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FOLDER", help="Write all as pages.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show recipe keys, data-source options, settings and figures: type, default, range and meaning."""
    with waiting("looking at the classes"):
        chapters = whole_reference()
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for name, text in pages(chapters).items():
            (write / name).write_text(text, encoding="utf-8")
    everything = [one for tables in chapters.values() for one in tables]
    chosen = everything if path is None else found(path, chapters)
    if as_json:
        return emit_json([asdict(one) for one in chosen])
    if path is None:
        rows = [[one.path or "recipe", len(one.keys), one.meaning] for one in everything]
        return results.print(table(["table", "keys", "meaning"], rows, prose=["meaning"]))
    return _show(chosen)


def whole_reference() -> dict[str, list[Table]]:
    """All chapters: the library's and the settings of the services."""
    from distill_core.reference import library_reference, settings_reference
    from distill_service.settings import Settings
    from distillery_sampler.settings import SamplerSettings

    shared = settings_reference(Settings, "DISTILLERY_")
    sampler = settings_reference(SamplerSettings, "DISTILLERY_SAMPLER_")
    settings = [replace(shared, path="settings"), replace(sampler, path="settings.sampler")]
    return {**library_reference(), "Settings": settings}


def found(path: str, chapters: dict[str, list[Table]]) -> list[Table]:
    """The tables at or below `path`, or those with the keys of that name, with no others in them.

    Raises:
        NotFound: nothing is called so.
    """
    everything = [one for tables in chapters.values() for one in tables]
    titles = {title.lower().replace(" ", "-"): tables for title, tables in chapters.items()}
    below = [one for one in everything if one.path == path or one.path.startswith((f"{path}.", f"{path}["))]
    chosen = titles.get(path.lower()) or below or _with_keys(everything, path)
    if not chosen:
        names = {one.path for one in everything} | {name for one in everything for name in _names(one)}
        raise NotFound(f"nothing is called {path!r}{nearest(path, names - {''})}", field="path")
    return chosen


def _with_keys(everything: Sequence[Table], path: str) -> list[Table]:
    for matches in (lambda table, key: _is(path, _full(table, key)), lambda table, key: key.name == path):
        keys = [(one, tuple(key for key in one.keys if matches(one, key))) for one in everything]
        if any(kept for _, kept in keys):
            return [replace(one, keys=kept) for one, kept in keys if kept]
    return []


def _is(path: str, full: str) -> bool:
    """Whether `path` is that key: a ROLE may have any name, and a source, method, kind or field need not be named."""
    chapter, _, rest = full.partition(".")
    short = f"{chapter}.{rest.partition('.')[2]}" if chapter in SHORT else full
    pattern = re.sub(r"\b[A-Z]+\b", r"[^.]+", re.escape(full)) if "." in full else re.escape(full)
    return path == short or re.fullmatch(pattern, path) is not None or _prefixed(path, full)


def _prefixed(path: str, full: str) -> bool:
    """Whether `path` is the figure `full` with a prefix, as teacher_accuracy is."""
    return full.startswith("figures.") and path.endswith(f"_{full.removeprefix('figures.')}")


def _full(one: Table, key: Key) -> str:
    named = one.path and not one.path.startswith("settings")
    return f"{one.path}.{key.name}" if named else key.name


def _names(one: Table) -> Iterator[str]:
    for key in one.keys:
        yield from (key.name, _full(one, key))


def _show(chosen: Sequence[Table]) -> None:
    for number, one in enumerate(chosen):
        results.print(styled("\n" if number else "", (one.path or "recipe", "bold"), f": {one.meaning}"))
        results.print(table(COLUMNS, _rows(one), prose=COLUMNS[1:]))


def _rows(one: Table) -> list[list[str]]:
    return [
        [
            key.name,
            key.kind,
            "must be given" if key.default is None else key.default,
            key.allowed,
            key.meaning,
        ]
        for key in one.keys
    ]


def pages(chapters: dict[str, list[Table]]) -> dict[str, str]:
    """A Markdown page for each chapter, and one that leads to them, by file name."""
    files = {title: f"{title.lower().replace(' ', '-')}.md" for title in chapters}
    lead = "\n".join(
        f"- [{title}]({files[title]}): {_contents(tables)}" for title, tables in chapters.items()
    )
    shown = "`distillery reference PATH` shows a part, e.g. `distillery reference data.images`."
    made = {"index.md": f"# Reference\n\n{INTRODUCTION}\n\n{shown}\n\n{lead}\n"}
    for title, tables in chapters.items():
        parts = [f"# {title}\n\n{INTRODUCTION}\n", *map(_section, tables)]
        made[files[title]] = "\n".join(parts)
    return made


def _contents(tables: Sequence[Table]) -> str:
    return ", ".join(f"`{one.path or 'recipe'}`" for one in tables if one.path.count(".") < 2)


def _section(one: Table) -> str:
    rows = [[f"`{row[0]}`", *row[1:]] for row in _rows(one)]
    columns = [column for index, column in enumerate(COLUMNS) if any(row[index] for row in rows)]
    kept = [[_markdown(cell) for column, cell in zip(COLUMNS, row) if column in columns] for row in rows]
    body = markdown_table(columns, kept) if rows else "It has no keys.\n"
    return f"## `{one.path or 'recipe'}`\n\n{_markdown(one.meaning)}\n\n{body}"


def _markdown(text: str) -> str:
    """Data as Markdown: what is not inside backquotes is no markup."""
    parts = text.split("`")
    return "`".join(
        part if index % 2 else re.sub(r"([*_<\[\]])", r"\\\1", part) for index, part in enumerate(parts)
    )

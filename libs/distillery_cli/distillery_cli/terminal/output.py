"""Output of commands: results on stdout, everything else (progress, remarks, errors) on stderr."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from distillery_cli.terminal.consoles import json_text, notes, results, shown, styled
from distillery_cli.terminal.tables import FittedTable, figure, table

__all__ = ["FittedTable", "figure", "notes", "results", "shown", "styled", "table"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated."),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="The artifact store, a folder or a URL; unset: the settings'."
    ),
]
LINE_EVERY_S = 10.0  # without a terminal: a line this often instead of a bar


def emit_json(value: Any) -> None:
    """One JSON value on one line of stdout; figures that JSON cannot say become null."""
    results.file.write(json_text(json.dumps(_finite(value), ensure_ascii=False)) + "\n")
    results.file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same as Markdown; a bar inside a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *([figure(cell) for cell in row] for row in rows)]
    return "".join(
        "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |\n" for line in lines
    )


def figures_line(values: Mapping[str, Any], *, at_most: int = 4) -> str:
    """The first few figures in one line."""
    shown = [(name, value) for name, value in values.items() if not name.endswith("_lr")][:at_most]
    return "  ".join(f"{name} {figure(value)}" for name, value in shown)


def duration(seconds: float) -> str:
    """`42 s`, `3:05` or `2:03:05`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Bar:
    """One line of progress; `tell` takes a run's events as the training loop and the job table give them."""

    def __init__(self, progress: Progress, task: TaskID, title: str, *, live: bool) -> None:
        self._progress, self._task, self._live = progress, task, live
        self.title, self._began = title, time.monotonic()
        self._printed = self._began

    def tell(self, event: Mapping[str, Any]) -> None:
        """Show an event of the training, or of a model that has to be trained before it."""
        if event.get("event") == "progress":
            self.update(event["step"], event["steps"], rate=event.get("rate", 0), eta_s=event.get("eta_s"))
        elif event.get("event") == "metrics":
            self._progress.update(
                self._task, figures=shown(figures_line(event["values"], at_most=3), lines=False)
            )
        elif event.get("event") == "preparing":
            left = f"{duration(event['eta_s'])} left"
            self.say(f"first {event['model']}: {event['step']}/{event['steps']}, {left}")

    def update(self, step: int, steps: int, *, rate: float = 0.0, eta_s: float | None = None) -> None:
        """Show how far it is, how fast, and how long it will take; the mean rate if none is given."""
        if not rate and step:
            rate = step / max(time.monotonic() - self._began, 1e-6)
            eta_s = (steps - step) / rate
        speed = f"{rate:.3g}/s" + (f", {duration(eta_s)} left" if eta_s is not None else "")
        self._progress.update(self._task, completed=step, total=steps or None, speed=speed)
        self._line(f"{step}/{steps}, {speed}")

    def say(self, text: str) -> None:
        """Show a remark in place of the figures."""
        self._progress.update(self._task, figures=shown(text, lines=False))
        self._line(text)

    def _line(self, text: str) -> None:
        """Progress where nothing can be drawn over: a line now and then."""
        now = time.monotonic()
        if not self._live and now - self._printed >= LINE_EVERY_S:
            self._printed = now
            notes.print(f"{self.title}: {text}")

    def done(self, text: str = "done") -> None:
        """Show that this line has ended."""
        self._progress.update(self._task, speed=shown(text, lines=False))
        self._progress.stop_task(self._task)


class Bars:
    """Lines of progress, one per piece of work."""

    def __init__(self) -> None:
        self._live = notes.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            console=notes,
            disable=not self._live,
        )

    def add(self, title: str, total: int | None = None) -> Bar:
        """A new line."""
        title = shown(title, lines=False)
        if not self._live:
            notes.print(f"{title} …")
        task = self._progress.add_task(title, total=total, speed="", figures="")
        return Bar(self._progress, task, title, live=self._live)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Bar]:
    """A single line of progress."""
    with Bars() as bars:
        yield bars.add(title, total)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on a terminal, one line elsewhere."""
    if not notes.is_terminal:
        notes.print(f"{text} …")
        yield
        return
    with notes.status(styled(text), spinner="dots" if notes.encoding.startswith("utf") else "line"):
        yield

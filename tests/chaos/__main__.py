"""`make chaos`: `python -m tests.chaos --seed 6 --faults 200`. Prints the table and writes out/chaos/report.json."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tests.chaos import campaign
from tests.chaos import page as pages
from tests.chaos.faults import FAULTS
from tests.chaos.world import BROKERS

console = Console()


def main(
    seed: Annotated[
        int | None, typer.Option(help="chooses the faults; printed, so that a run can be repeated")
    ] = None,
    faults: Annotated[int, typer.Option(min=1, help="how many, over all brokers")] = 200,
    broker: Annotated[str, typer.Option(help=f"one of {', '.join(BROKERS)}, or all")] = "all",
    minutes: Annotated[
        float, typer.Option(min=0.1, help="of faults, over all brokers; then no new ones")
    ] = 20.0,
    pause: Annotated[float, typer.Option(min=0.01, help="mean seconds between two faults")] = 2.0,
    only: Annotated[
        list[str] | None, typer.Option(help="a kind of fault; may be given several times")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("out/chaos"),
    page: Annotated[Path | None, typer.Option(help="put the tables between this page's two marks")] = None,
) -> None:
    """Kill, stop and starve everything at random moments, and count what was lost. Exit code 1 if anything was."""
    _check(broker, only or [], page)
    options = campaign.Options(
        seed=secrets.randbelow(10_000) if seed is None else seed,
        faults=faults,
        brokers=BROKERS if broker == "all" else (broker,),
        minutes=minutes,
        pause_s=pause,
        only=tuple(only or ()),
    )
    console.print(f"seed {options.seed}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("starting", total=faults)
        result = campaign.run(
            options, tell=lambda done, what: progress.update(task, completed=done, description=what)
        )
    out.mkdir(parents=True, exist_ok=True)
    report = result.report()
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _print(report)
    if page is not None:
        pages.write(page, report)
    raise typer.Exit(0 if result.verdict.good else 1)


def _check(broker: str, only: list[str], page: Path | None) -> None:
    if broker not in (*BROKERS, "all"):
        raise typer.BadParameter(f"{broker!r} is not one of {', '.join(BROKERS)}, all", param_hint="--broker")
    known = [fault.name for fault in FAULTS]
    for name in only:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--only")
    try:
        if page is not None:
            pages.around(page)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--page") from None


def _print(report: dict[str, Any]) -> None:
    faults = Table("fault", *report["brokers"], title=f"{report['faults']} faults, seed {report['seed']}")
    for row in pages.fault_rows(report):
        faults.add_row(*row)
    console.print(faults)
    verdict = Table("must be 0", "found", "of")
    for row in pages.verdict_rows(report):
        verdict.add_row(*row)
    console.print(verdict)
    for sentence in pages.remarks(report):
        console.print(sentence, markup=False)
    console.print(f"{report['seconds']} s")


if __name__ == "__main__":
    typer.run(main)

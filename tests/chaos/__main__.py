"""`make chaos`: `python -m tests.chaos --seed 6 --faults 200`. Prints the table and writes out/chaos/report.json."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

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
from tests.chaos.faults import FAULTS
from tests.chaos.world import BROKERS

ZERO = ("jobs_lost", "run_twice", "published_twice", "half_published", "orphans", "weights_differ")
console = Console()


def main(
    seed: Annotated[
        int | None, typer.Option(help="chooses the faults; printed, so that a run can be repeated")
    ] = None,
    faults: Annotated[int, typer.Option(min=1, help="how many, over all brokers")] = 200,
    broker: Annotated[str, typer.Option(help=f"one of {', '.join(BROKERS)}, or all")] = "all",
    minutes: Annotated[float, typer.Option(min=0.1, help="no new faults after that")] = 20.0,
    only: Annotated[
        list[str] | None, typer.Option(help="a kind of fault; may be given several times")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("out/chaos"),
) -> None:
    """Kill, stop and starve everything at random moments, and count what was lost. Exit code 1 if anything was."""
    _check(broker, only or [])
    options = campaign.Options(
        seed=secrets.randbelow(10_000) if seed is None else seed,
        faults=faults,
        brokers=BROKERS if broker == "all" else (broker,),
        minutes=minutes,
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
    (out / "report.json").write_text(json.dumps(result.report(), indent=1) + "\n", encoding="utf-8")
    _print(result)
    raise typer.Exit(0 if result.verdict.good else 1)


def _check(broker: str, only: list[str]) -> None:
    if broker not in (*BROKERS, "all"):
        raise typer.BadParameter(f"{broker!r} is not one of {', '.join(BROKERS)}, all", param_hint="--broker")
    known = [fault.name for fault in FAULTS]
    for name in only:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--only")


def _print(result: campaign.Result) -> None:
    report = result.report()
    table = Table("fault", *result.brokers, title=f"{report['faults']} faults, seed {report['seed']}")
    for kind, counts in report["by_fault"].items():
        table.add_row(kind, *(str(counts[broker]) for broker in result.brokers))
    console.print(table)
    verdict = Table("must be 0", "found", "of")
    of = {"jobs_lost": f"{report['jobs']} jobs", "run_twice": f"{report['attempts']} attempts"}
    of |= {"weights_differ": f"{report['models']} models, {report['resumed']} resumptions"}
    of |= {"orphans": f"{report['restarts']} restarted services"}
    for name in ZERO:
        verdict.add_row(name, str(report[name]), of.get(name, ""))
    console.print(verdict)
    for sentence in (*report["skipped"], *report["said"]):
        console.print(sentence, markup=False)
    console.print(f"{report['seconds']} s")


if __name__ == "__main__":
    typer.run(main)

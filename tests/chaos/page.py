"""What a campaign came to, as rows for the terminal and as the section of a page between two marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distillery_cli.terminal.output import markdown_table

ZERO = {
    "jobs_lost": "jobs lost",
    "run_twice": "jobs run twice at once",
    "published_twice": "jobs that published twice",
    "half_published": "half-published versions",
    "orphans": "processes left behind",
    "weights_differ": "models whose weights differ from an undisturbed run's",
}
BEGIN, END = "<!-- chaos -->\n", "<!-- /chaos -->"


def verdict_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what must be 0, how many were found, of how many), from the content of report.json."""
    of = {
        "jobs_lost": f"{report['jobs']:,} jobs",
        "run_twice": f"{report['attempts']:,} attempts",
        "half_published": f"{report['models']:,} versions",
        "orphans": f"{report['restarts']:,} restarted services",
        "weights_differ": f"{report['models']:,} versions, {report['resumed']:,} resumptions",
    }
    return [(said, str(report[name]), of.get(name, "")) for name, said in ZERO.items()]


def fault_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """(kind of fault, how often on each broker), from the content of report.json."""
    brokers = report["brokers"]
    return [(kind, *(str(counts[name]) for name in brokers)) for kind, counts in report["by_fault"].items()]


def remarks(report: dict[str, Any]) -> list[str]:
    """Sentences: kinds of fault that a broker cannot have or never had, then what was found wrong."""
    missed = [f"{kind} found nothing of its kind {count} times" for kind, count in report["missed"].items()]
    return [*report["skipped"], *missed, *report["said"]]


def markdown(report: dict[str, Any]) -> str:
    """Both tables, and what they rest on."""
    said = f"Seed {report['seed']}: {report['faults']} faults, {report['seconds'] / 60:.0f} minutes in all."
    verdict = markdown_table(("must be 0", "found", "of"), verdict_rows(report))
    faults = markdown_table(("fault", *report["brokers"]), fault_rows(report))
    listed = "".join(f"- {sentence}\n" for sentence in remarks(report))
    return "\n".join((f"{said}\n", verdict, faults, listed))


def write(page: Path, report: dict[str, Any]) -> None:
    """Put the report between the page's two marks."""
    before, after = around(page)
    page.write_text(f"{before}{BEGIN}{markdown(report)}{END}{after}", encoding="utf-8")


def around(page: Path) -> tuple[str, str]:
    """The page's text before and after its two marks; ValueError where it lacks them."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not ended:
        raise ValueError(f"{page} has no lines {BEGIN.strip()} and {END}: add both where the tables belong")
    return before, after

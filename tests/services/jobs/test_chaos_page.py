"""What `make chaos` says: its witnesses, the section of a page that it writes, and the one that is there now."""

from __future__ import annotations

import re
import resource
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tests.chaos import __main__ as command
from tests.chaos import page
from tests.chaos.campaign import Options, Result
from tests.chaos.faults import FAULTS
from tests.chaos.verdict import Verdict
from tests.chaos.witness import FOLDER, Signature, Witness
from tests.helpers import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "deployment.md"


def made(**verdict):
    result = Result(Options(seed=9), verdict=Verdict(jobs=1200, attempts=1500, **verdict))
    result.brokers = ["embedded", "redis"]
    result.counts["kill_all", "redis"] = 3
    result.missed["kill_while_saving"] = 2
    return result


def test_the_page_has_every_kind_of_fault_and_all_that_must_be_zero_with_its_count():
    text = page.markdown(made(jobs_lost=1, orphans=4, said=["job abc ended as FAILED"]).report())
    assert "| jobs lost | 1 | 1,200 jobs |" in text
    assert "| processes left behind | 4 |" in text
    assert "| kill_all | 0 | 3 |" in text
    assert all(f"| {fault.name} |" in text for fault in FAULTS)
    assert "- job abc ended as FAILED\n" in text
    assert "- kill_while_saving found nothing of its kind 2 times\n" in text
    assert text.startswith("Seed 9: 3 faults")


def test_a_job_process_that_may_write_no_file_still_signs_its_end(tmp_path, monkeypatch):
    witness = Witness(tmp_path / "witness")
    monkeypatch.setenv(FOLDER, str(witness.folder))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Signature({"job": "abc", "kind": "train", "attempt": 1}):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
            assert [line.job for line in witness.running("train")] == ["abc"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line.what for line in witness.lines()] == ["start", "end"]
    assert witness.running("train") == []


def test_no_count_that_fails_a_run_is_left_out_of_its_table():
    for name in page.ZERO:
        assert not replace(Verdict(), **{name: 1}).good
    assert Verdict(jobs=1, attempts=2, resumed=3, models=4, resent=5, restarts=6).good


def test_the_tables_replace_what_lay_between_the_marks_and_nothing_else(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{page.BEGIN}old\n{page.END}\nafter\n")
    page.write(document, made().report())
    page.write(document, made().report())
    text = document.read_text()
    assert text.startswith(f"before\n{page.BEGIN}Seed 9")
    assert text.endswith(f"|\n\n- kill_while_saving found nothing of its kind 2 times\n{page.END}\nafter\n")
    assert "old" not in text
    assert text.count("Seed 9") == 1


@pytest.mark.parametrize("text", ["no marks\n", page.BEGIN, page.END])
def test_a_page_without_marks_is_refused_before_the_campaign_begins(tmp_path, text):
    document = tmp_path / "page.md"
    document.write_text(text)
    app = command.typer.Typer()
    app.command()(command.main)
    done = CliRunner().invoke(app, ["--page", str(document)])
    assert done.exit_code == 2
    assert "has no lines" in " ".join(done.output.replace("│", " ").split())
    assert document.read_text() == text


def test_the_deployment_page_shows_a_whole_campaign_that_lost_nothing():
    before, after = page.around(DOCUMENT)
    shown = DOCUMENT.read_text()[len(before) : -len(after)]
    found = dict(re.findall(r"^\| ([^|]+) \| (\d+) \| [^|]*\|$", shown, re.M))
    assert {said: found.get(said) for said in page.ZERO.values()} == dict.fromkeys(page.ZERO.values(), "0")
    done = int(re.search(r"(\d+) faults", shown)[1])
    assert done >= 200
    counts = {
        cells[1]: sum(map(int, cells[2:-1])) for cells in map(_cells, shown.splitlines()) if _named(cells)
    }
    assert set(counts) == {fault.name for fault in FAULTS}
    assert min(counts.values()) > 0
    assert sum(counts.values()) == done


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def _named(cells: list[str]) -> bool:
    return len(cells) > 1 and cells[1] in {fault.name for fault in FAULTS}

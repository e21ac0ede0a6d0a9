"""What is printed is data: no name is markup, steers a terminal, breaks in the middle or needs an encoding."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillery_cli.app import main
from distillery_cli.terminal import output
from distillery_cli.terminal.consoles import Printer, json_text, shown
from distillery_cli.terminal.output import Bars, emit_json, styled, table

NAMES = [
    "run [/final]",
    "[red]x[/red]",
    ":smile:",
    "a\x1b[2Jb",
    "\u202egpj.exe",
    "x\x07y\x9b1m",
    "[@click=a]",
]
JOBS = [
    ["0123456789ab", "run [/final]", "train", "SUCCEEDED", "2000/2000", "dmd2-digits@1", ""],
    [
        "0123456789ac",
        "a cat on a mat",
        "train",
        "FAILED",
        "",
        "",
        "data.path = '/a/long/path' is no folder; give one",
    ],
]
COLUMNS = ["id", "name", "kind", "state", "progress", "artifact", "error"]


def printed(*objects: object, width: int = 180, terminal: bool = True) -> str:
    file = io.StringIO()
    Printer(file=file, width=width, force_terminal=terminal, color_system=None).print(*objects)
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["text", "styled", "table", "title", "column", "narrow table", "bar"])
def test_a_name_is_printed_as_it_is_wherever_it_stands(name, form, monkeypatch):
    made = {
        "text": lambda: printed(name),
        "styled": lambda: printed(styled(("error:", "red"), " ", name)),
        "table": lambda: printed(table(["name", "n"], [[name, 3]])),
        "title": lambda: printed(table(["n"], [[3]], title=name)),
        "column": lambda: printed(table([name], [[3]])),
        "narrow table": lambda: printed(table(["name", "n"], [[name, "x" * 30]]), width=20),
        "bar": lambda: _bar(name, monkeypatch),
    }[form]()
    assert shown(name) in made
    assert not re.search(r"[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]|\x1b\[2J", made.replace("\r", ""))


def _bar(title: str, monkeypatch: pytest.MonkeyPatch) -> str:
    file = io.StringIO()
    console = Printer(file=file, width=180, force_terminal=True, color_system=None)
    monkeypatch.setattr(output, "notes", console)
    with Bars() as bars:
        line = bars.add(title, 3)
        line.say(title)
        line.done(title)
    assert file.getvalue().count(shown(title)) >= 3
    return re.sub(r"\x1b\[(\?25[lh]|2K|\d?A|\d*m)", "", file.getvalue())


def test_what_steers_a_terminal_becomes_visible_and_words_of_any_script_stay():
    assert shown("a\x1b[2J\u202e\u2028b\udcffc\x85") == r"a\x1b[2J\u202e\u2028b\xffc\x85"
    assert shown("Müller 猫 می‌خواهم 👩‍🚀\n\ttail") == "Müller 猫 می‌خواهم 👩‍🚀\n\ttail"
    assert shown("a\nerror: b", lines=False) == r"a\nerror: b"


@given(st.text(max_size=60))
def test_any_text_can_be_printed_in_any_encoding(text):
    for encoding in ("utf-8", "ascii", "latin-1"):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding, errors="distillery")
        Printer(file=file, width=90).print(text, table(["a", "b"], [[text, 1]], title=text))
        file.flush()
        assert "\x1b" not in raw.getvalue().decode(encoding)


@pytest.mark.slow
@given(
    st.recursive(
        st.text(max_size=20) | st.integers(), lambda inner: st.dictionaries(st.text(max_size=9), inner)
    )
)
def test_json_says_the_same_whatever_is_escaped(value):
    text = json_text(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert shown(text) == text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_no_name_is_broken_at_any_width(width):
    made = printed(table(COLUMNS, JOBS, prose=["error"], spare=["kind"]), width=width)
    for cell in (cell for row in JOBS for cell in row[:-1] if cell not in ("", "train")):
        assert cell in made
    for word in JOBS[1][-1].split():
        assert word in made
    if "id " in made.splitlines()[0] and "name" in made.splitlines()[0]:
        assert max(len(line) for line in made.splitlines()) <= width


def test_a_narrow_table_says_what_it_leaves_out():
    rows = [["a" * 20, "b" * 20, ""], ["c", "d", ""]]
    made = printed(table(["one", "two", "empty"], rows, spare=["two"]), width=30)
    assert "b" * 20 not in made
    assert "empty" not in made
    assert made.splitlines()[-1] == "not shown for want of width: two"


def test_in_a_file_every_row_is_one_line():
    made = printed(table(["name", "n"], [["x" * 200, "y" * 90], ["z", ""]]), width=180, terminal=False)
    assert len(made.splitlines()) == 3


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "é[/x]猫\x1b[2J"], ["jobs", "--lim[/x]it"], ["tr[/]ain"]]
)
def test_every_output_encoding_works(encoding, arguments):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, "-m", "distillery_cli", *arguments],
        capture_output=True,
        env=environment,
        check=False,
    )
    said = (done.stdout + done.stderr).decode(encoding.partition(":")[0])
    assert "internal error" not in said
    assert "Traceback" not in said
    assert "\x1b[2J" not in said
    assert done.returncode == {"--help": 0, "train": 67}.get(arguments[0], 2)


def test_json_of_an_output_that_knows_only_ascii_is_json():
    script = (
        "from distillery_cli.terminal.output import emit_json; emit_json({'a': 'é\\x1b\\u202e猫\\U0001f600'})"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout) == {"a": "é\x1b\u202e猫\U0001f600"}


def test_json_keeps_letters_and_escapes_what_steers_a_terminal(capsys):
    emit_json({"a": "é\x9b\u202e"})
    assert capsys.readouterr().out == '{"a": "é\\u009b\\u202e"}\n'


@pytest.mark.slow
def test_a_command_whose_output_is_closed_does_not_fail():
    script = f"exec {sys.executable} -m distillery_cli methods >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [["generate", "x", "--prompt"], ["submit", "edm_digits", "--name"], ["pause", "train", "--reason"]],
)
def test_an_argument_that_is_no_text_is_a_sentence(arguments, capsys):
    assert main([*arguments, "caf\udce9"]) == 2
    assert r"'caf\udce9' is not text in UTF-8" in capsys.readouterr().err


READS_FOREIGN_FILES = """
import sys
from pathlib import Path

from {start} import main

{begin}
import pyarrow
import pyarrow.parquet
from transformers import AutoModel

from tests.helpers import tiny_text_to_image

folder = Path(sys.argv[1])
model = AutoModel.from_pretrained(tiny_text_to_image(folder / "pipeline") / "text_encoder")
(folder / "rows").mkdir()
pyarrow.parquet.write_table(pyarrow.table({{"label": [0, 1], "text": ["a", "b"]}}), folder / "rows" / "x.parquet")
import datasets
datasets.load_dataset("parquet", data_files=str(folder / "rows" / "x.parquet"), cache_dir=str(folder / "cache"))
from diffusers.utils.logging import tqdm
list(tqdm([1, 2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "begin"),
    [
        ("distillery_cli", "main(['--version'])"),
        ("distill_core.job.entry", "main([str(Path(sys.argv[1]) / 'none.json')])"),
    ],
    ids=["command", "job"],
)
def test_bars_of_other_libraries_do_not_appear_in_files(start, begin, tmp_path):
    script = READS_FOREIGN_FILES.format(start=start, begin=begin)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert not [line for line in (done.stderr + done.stdout).splitlines() if "it/s" in line or "%|" in line]

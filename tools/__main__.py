"""`python -m tools`: the documents' figures as commands."""

from __future__ import annotations

import sys

import typer

from distillery_cli.terminal.running import run
from tools import claims, field_kinds, memory, pipelines

app = typer.Typer(
    name="tools",
    help="Measure and write the figures of the documents.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (claims, field_kinds, memory, pipelines):
    _module.register(app)


if __name__ == "__main__":
    sys.exit(run(app, "python -m tools"))

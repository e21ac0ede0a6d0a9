"""`python -m benchmarks`: the benchmarks as commands."""

from __future__ import annotations

import sys

import typer

from benchmarks import job_queue, overview, serving
from distillery_cli.terminal.running import run

app = typer.Typer(
    name="benchmarks",
    help="Measure speed: server, queue, renderer, training steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (overview, serving, job_queue):
    _module.register(app)


if __name__ == "__main__":
    sys.exit(run(app, "python -m benchmarks"))

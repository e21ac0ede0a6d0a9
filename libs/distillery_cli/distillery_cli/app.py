"""The command tree."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from distill_core.errors import DISTRIBUTION
from distillery_cli import reference
from distillery_cli.jobs import compare, listing, operations, submit
from distillery_cli.models import adapters, generate, imports, predict, store
from distillery_cli.scenes import convert_field, export, render, view
from distillery_cli.stack import demo, doctor, health, up
from distillery_cli.terminal.output import results
from distillery_cli.terminal.running import run
from distillery_cli.training import train

app = typer.Typer(
    name="distillery",
    help="Distil models, queue the work, publish the results and serve them.",
    epilog="Start with: distillery demo  ·  distillery doctor  ·  distillery COMMAND --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            results.print(f"distillery {version(DISTRIBUTION)}")
        except PackageNotFoundError:  # run from a checkout that is not installed
            results.print("distillery (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil models, queue the work, publish the results and serve them."""


for _module in (
    demo,
    up,
    submit,
    listing,
    compare,
    operations,
    train,
    reference,
    store,
    adapters,
    imports,
    generate,
    predict,
    render,
    view,
    export,
    convert_field,
    doctor,
    health,
):
    _module.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `distillery` command line; the exit code."""
    return run(app, "distillery", arguments)

"""`distillery import`: models that other programs made, published here and served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError
from distillery_cli.terminal.output import AsJson, Bar, StoreUrl, bar, emit_json, notes, results

if TYPE_CHECKING:
    from distill_core.api import Imported

STAGES = 7  # that an import tells of


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        "import",
        epilog="Examples: distillery import ./sdxl --name my-sdxl --licence openrail++  ·  distillery import "
        "style.safetensors --name style --base my-sdxl@1  ·  distillery import model.safetensors --name mine "
        "--config ./sd15 --steps 25  ·  distillery import ./unknown --name x --dry-run",
    )(import_)


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A pipeline's folder (whole, sharded or fp16), a .safetensors checkpoint or LoRA, or a peft folder."
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="The name to publish it under.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="REF", help="What a LoRA adapts, or what completes a checkpoint: name@version."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A pipeline with the settings and tokenizer of a checkpoint."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of its sampler; unset: its own.")] = None,
    licence: Annotated[str, typer.Option(help="Its licence; unset: that of its base.")] = "",
    form: Annotated[
        str, typer.Option(help="Of a LoRA: adapter, over its base in the store, or merged with all weights.")
    ] = "adapter",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Recognise and check it, and publish nothing.")
    ] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model of another program: it is recognised, checked, and served as soon as it is there.

    Only safetensors are read, and nothing is fetched.
    """
    if form not in ("merged", "adapter"):
        raise ConfigError(f"--form {form} is unknown; choose merged or adapter", field="form")
    with bar(f"importing {source.name}", STAGES) as shown:
        from distill_core import api
        from distillery_cli.training.train import local_context

        wish = api.Wish(name, base, config, steps, licence, form, dry_run)  # type: ignore[arg-type]
        imported = api.import_model(source, wish, local_context(store), _teller(shown))
        shown.done()
    if as_json:
        return emit_json(_summary(imported, dry_run))
    return _show(imported, dry_run)


def _teller(shown: Bar) -> Any:
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        shown.update(len(told), STAGES)
        shown.say(text)

    return tell


def _summary(imported: Imported, dry_run: bool) -> dict[str, Any]:
    manifest = imported.manifest
    return {
        "artifact": None if dry_run else manifest.ref,
        "recognised": imported.recognised,
        "assumed": list(imported.assumed),
        "form": None if dry_run else manifest.form,
        "parents": list(manifest.parents),
        "licence": manifest.licence,
        "sha256": manifest.imported,
    }


def _show(imported: Imported, dry_run: bool) -> None:
    manifest = imported.manifest
    results.print(f"recognised: {imported.recognised}", markup=False)
    for sentence in imported.assumed:
        results.print(f"assumed: {sentence}", markup=False)
    if not manifest.licence:
        notes.print("no licence is said; give --licence before you share it")
    results.print("nothing is published (--dry-run)" if dry_run else f"published: {manifest.ref}")

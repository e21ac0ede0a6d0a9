"""`distillery models`, `alias` and `convert`: the artifact store, and new forms of what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.cards import facts, generator_card
from distill_core.signature import described
from distillery_cli.terminal.output import AsJson, StoreUrl, emit_json, figure, notes, results, table

if TYPE_CHECKING:
    from distill_core.artifacts import ArtifactStore, ExportReport, Manifest


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: distillery models  ·  distillery models dmd2-digits@latest")(models)
    app.command(
        epilog="Examples: distillery alias dmd2-digits@3 prod  ·  distillery alias dmd2-digits --history"
    )(alias)
    app.command(
        epilog="Examples: distillery convert dmd2-digits  ·  distillery convert dmd2-digits --target trt-fp16"
    )(convert)


def open_store(url: str | None) -> ArtifactStore:
    """The store at `url`, or else the one that the settings name."""
    from distill_core.artifacts import ArtifactStore
    from distill_service.settings import settings

    return ArtifactStore(url or settings().store_url)


def models(
    ref: Annotated[
        str | None, typer.Argument(help="name, name@version or name@alias; without it, all.")
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """List the published models, or show one of them."""
    opened = open_store(store)
    if ref is not None:
        manifest = opened.manifest(ref)
        return emit_json(manifest.model_dump(mode="json")) if as_json else _show(manifest)
    listed = [_summary(opened, name, version) for name in opened.names() for version in opened.versions(name)]
    if as_json:
        return emit_json(listed)
    if not listed:
        return results.print(f"no models in {opened.url} yet; `distillery train edm_digits` publishes one")
    columns = ["model", "aliases", "kind", "form", "base", "method", "exports", "frechet_distance", "created"]
    rows = [[_cell(entry[column]) for column in columns] for entry in listed]
    spare = ["base", "form", "created", "method"]
    return results.print(table(columns, rows, prose=["aliases", "exports"], spare=spare))


def _summary(opened: ArtifactStore, name: str, version: int) -> dict[str, Any]:
    aliases = [alias for alias, number in opened.aliases(name).items() if number == version]
    try:
        manifest = opened.manifest(f"{name}@{version}")
        base = generator_card(manifest).base
    except ArtifactError as error:  # the others can still be listed
        notes.print(f"warning: {error}")
        empty = dict.fromkeys(("form", "base", "method", "exports", "frechet_distance", "created"))
        return {"model": f"{name}@{version}", "aliases": aliases, "kind": "damaged", **empty}
    return {
        "model": manifest.ref,
        "aliases": aliases,
        "kind": manifest.kind,
        "form": manifest.form,
        "base": base,
        "method": manifest.method,
        "exports": list(manifest.exports),
        "frechet_distance": manifest.metrics.get("frechet_distance"),
        "created": manifest.created,
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(value) if isinstance(value, list) else figure(value)


def _show(manifest: Manifest) -> None:
    rows = [
        [key, _cell(list(value) if isinstance(value, tuple) else value)]
        for key, value in manifest.model_dump(
            exclude={"files", "exports", "metrics"}, exclude_none=True
        ).items()
        if value not in ("", (), {}) and not isinstance(value, dict)
    ]
    rows.append(["form", manifest.form])
    rows += [[key, _cell(value)] for key, value in facts(manifest).items()]
    for row in described(manifest.signature):
        for side in ("inputs", "outputs"):
            rows += [[f"{row['function']}.{side}", f"{name}: {said}"] for name, said in row[side].items()]
    rows += [[f"metrics.{name}", figure(value)] for name, value in manifest.metrics.items()]
    for name, report in manifest.exports.items():
        rows += [[f"exports.{name}{part}", said] for part, said in _export(report)]
    size = sum(entry.size for entry in manifest.files.values())
    rows.append(["files", f"{len(manifest.files)}, {size / 1e6:.1f} MB"])
    results.print(table(["key", "value"], rows, prose=["value"]))


def _export(report: ExportReport) -> list[tuple[str, str]]:
    """A converted form in words: what it differs by, then each of its graphs."""
    whole = [f"max difference from PyTorch {report.max_abs_difference:.2g} of {report.tolerance:g} allowed"]
    if report.frechet is not None:
        frechet = report.frechet
        whole.append(
            f"Fréchet distance {frechet.before:.3g} before, {frechet.after:.3g} after ({frechet.ratio:.3f} x; "
            f"{frechet.samples} samples of {frechet.num_steps} steps, {frechet.features}, to {frechet.reference})"
        )
    parts = []
    for name, graph in report.graphs.items():
        facts = [f"{graph.precision}, {graph.size / 1e6:.2f} MB, relative L2 {graph.rel_l2:.2g}"]
        facts += [f"{graph.snr_db:.1f} dB"] if graph.snr_db is not None else []
        facts += [f"{graph.changed_pixels:.2%} of pixels differ"] if graph.changed_pixels is not None else []
        facts += [f"{graph.agreement:.2%} of answers agree"] if graph.agreement is not None else []
        facts += [f"in float: {graph.left_in_float}"] if graph.left_in_float else []
        parts.append((f".{name}", ", ".join(facts)))
    return [("", "; ".join(whole)), *parts]


def alias(
    ref: Annotated[
        str, typer.Argument(help="name@version (or name@alias) to point at; with --history, a name.")
    ],
    name: Annotated[str | None, typer.Argument(metavar="ALIAS", help="e.g. prod")] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Show every move of the model's aliases.")
    ] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Move an alias to a version, atomically; servers that serve NAME@ALIAS follow."""
    opened = open_store(store)
    if history:
        moves = [move.model_dump() for move in opened.history(ref.partition("@")[0])]
        if as_json:
            return emit_json(moves)
        columns = ["when", "alias", "version", "previous", "who"]
        return results.print(table(columns, [[_cell(move[column]) for column in columns] for move in moves]))
    if name is None:
        raise ConfigError("which alias should point there? e.g. distillery alias NAME@3 prod", field="alias")
    model, version = opened.resolve(ref)
    move = opened.set_alias(model, name, version, who="distillery alias")
    if as_json:
        return emit_json(move.model_dump())
    before = f", before {model}@{move.previous}" if move.previous is not None else ""
    return results.print(f"{model}@{name} is now {model}@{version}{before}")


def convert(
    ref: Annotated[str, typer.Argument(help="name@version or name@alias of a published model.")],
    target: Annotated[
        str, typer.Option(help="onnx-fp32, onnx-fp16, onnx-int8, trt-fp32, trt-fp16 or trt-bf16.")
    ] = "onnx-fp32",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference from PyTorch; unset: the target's.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Only queue it; do not wait.")] = False,
    as_json: AsJson = False,
) -> int:
    """Convert a model in the converter worker; the result is a new version of the same model."""
    from distillery_cli.jobs.listing import client, follow, show_submitted
    from distillery_trainer.client import convert_spec

    with client() as jobs:
        job = jobs.submit(convert_spec(ref, target, tolerance))
        if detach:
            show_submitted(job, as_json)
            return 0
        return follow(jobs, job, as_json)

"""`distillery adapter merge` and `export-adapter`: sums of LoRA students, and their files for other programs."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill_core.config import check_name
from distill_core.errors import ConfigError, nearest
from distill_core.kinds.cards import described
from distillery_cli.terminal.output import AsJson, StoreUrl, emit_json, results, waiting

if TYPE_CHECKING:
    from distill_core.artifacts import Manifest
    from distill_core.context import Context
    from distill_core.networks.adapters import LoraDenoiser

KEYS = ("diffusers", "kohya", "comfyui")
Term = tuple[str, float]  # a reference or folder, and its weight

adapter_app = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(adapter_app, name="adapter", help="Work with LoRA students: merge several over one base.")
    app.command(
        "export-adapter",
        epilog="Examples: distillery export-adapter my-style@2 --keys kohya --out my-style.safetensors  ·  "
        "distillery export-adapter fast --out fast.safetensors",
    )(export_adapter)


@adapter_app.command(
    epilog="Examples: distillery adapter merge fast@3:1 style@latest:0.5 --publish fast-style  ·  "
    "distillery adapter merge out/a/model:0.7 out/b/model:0.3 --base teacher@1 --out out/sum"
)
def merge(
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...", help="name@version or a model folder; the weight is 1."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="A new folder for the result.")] = None,
    publish: Annotated[str | None, typer.Option("--publish", metavar="NAME", help="Publish it so.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model they adapt, for adapters that do not name it.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="merged: with all weights, and the adapter beside; adapter: that alone.")
    ] = "merged",
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Add adapters of one base, W0 + a D1 + b D2 + …; the sum is sampled as the first of them is."""
    weighted = [_term(term) for term in terms]
    if (out is None) == (publish is None):
        raise ConfigError("where should the sum go? give --out FOLDER or --publish NAME", field="out")
    if publish is not None:
        check_name(publish, what="model", field="publish")
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; give --out a new folder", field="out")
    with waiting("adding the adapters"):
        from distill_core import api
        from distillery_cli.training.train import local_context

        context = local_context(store)
        total = api.merge_adapters(weighted, context, base=base)
        total.form = _form(form, total)
        if publish is not None:
            manifest = _publish(total, publish, weighted, context)
        else:
            total.save(Path(str(out)))
    if as_json:
        shown = {"artifact": manifest.ref} if publish is not None else {"model": str(out)}
        return emit_json({**shown, "base": total.base_ref, "form": total.form})
    return results.print(f"published: {manifest.ref}" if publish is not None else f"model: {out}")


def export_adapter(
    ref: Annotated[str, typer.Argument(help="name@version or a model folder, of a LoRA student.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A new .safetensors file.")],
    keys: Annotated[
        str, typer.Option(help="diffusers, kohya or comfyui: whose programs read it.")
    ] = "diffusers",
    base: Annotated[
        str | None, typer.Option(help="The model it adapts, for an adapter that does not name it.")
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write a student's LoRA as one file for diffusers, kohya's scripts (and what reads their files), or ComfyUI."""
    if keys not in KEYS:
        raise ConfigError(f"--keys {keys} is unknown{nearest(keys, KEYS)}", field="keys")
    with waiting("writing the adapter"):
        from distill_core import api
        from distillery_cli.training.train import local_context

        lora = api.export_adapter(ref, local_context(store), out, style=keys, base=base)  # type: ignore[arg-type]
    if as_json:
        return emit_json({"file": str(out), "keys": keys, "base": lora.base_ref})
    return results.print(f"written: {out}")


def _term(text: str) -> Term:
    ref, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not ref or not math.isfinite(value):
        raise ConfigError(f"{text!r} is no adapter and weight; write e.g. style@2:0.5", field="terms")
    return ref, value


def _form(wanted: str, total: LoraDenoiser) -> Literal["merged", "adapter"]:
    if wanted not in ("merged", "adapter"):
        raise ConfigError(f"--form {wanted} is unknown; choose merged or adapter", field="form")
    if wanted == "adapter" and not total.base_ref:
        raise ConfigError(
            "--form adapter needs a base that is in the store; give --base NAME@VERSION, or choose merged",
            field="form",
        )
    return "adapter" if wanted == "adapter" else "merged"


def _publish(total: LoraDenoiser, name: str, terms: list[Term], context: Context) -> Manifest:
    from distill_core.artifacts import Manifest
    from distill_core.kinds.base import image_probe_of

    parents = [context.store.manifest(ref) for ref, _ in terms if not Path(ref).is_dir()]
    licences = dict.fromkeys(parent.licence for parent in parents)
    draft = Manifest(
        name=name,
        title=" + ".join(
            f"{weight:g} {Path(ref).name if Path(ref).is_dir() else ref}" for ref, weight in terms
        ),
        parents=tuple(parent.ref for parent in parents),
        **({"licence": " AND ".join(licences)} if licences else {}),
        parity=image_probe_of(total),
        **described(total),
    )
    with tempfile.TemporaryDirectory(prefix="distillery-merge-") as scratch:
        total.save(Path(scratch))
        return context.store.publish(Path(scratch), draft)

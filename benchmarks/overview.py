"""`overview`: server against bare runtimes, renderer against renderer, training step against its passes."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.conversion import (
    CONVERSION_COLUMNS,
    PLOT,
    Comparison,
    conversion_rows,
    save_plot,
    stage_rows,
)
from benchmarks.gpu import gpu_rows
from benchmarks.radiance import COLUMNS, rendering_rows
from benchmarks.trainer import LIMIT
from distill_core.errors import ConfigError
from distillery_cli.terminal.output import AsJson, bar, emit_json, markdown_table, notes, results, table


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    program = "python -m benchmarks overview"
    app.command(epilog=f"Examples: {program}  ·  {program} --seconds 20 --out out/bench")(overview)


PARTS = ("steps", "sampler", "rendering", "conversion", "stages")
ON_REQUEST = ("gpu",)  # what most machines cannot measure


def overview(
    out: Annotated[Path, typer.Option("--out", help="Where report.json goes.")] = Path("out/bench"),
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Of load at each concurrency.")] = 5.0,
    page: Annotated[Path | None, typer.Option("--page", help="Write the tables as Markdown too.")] = None,
    steps: Annotated[int, typer.Option(min=3, max=10_000, help="Training steps that are timed.")] = 20,
    only: Annotated[
        str, typer.Option(help="Parts to measure; the others stay as --out has them.")
    ] = ",".join(PARTS),
    train_seconds: Annotated[
        float, typer.Option(min=1, help="Of the fields from images that a conversion is compared with.")
    ] = 480.0,
    scene: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Blender scene for it; unset: the procedural one."),
    ] = None,
    factor: Annotated[int, typer.Option(min=1, help="Its pictures are averaged over factor x factor.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure the sampler and the renderer against bare ones, training steps against their passes, field conversions.

    Networks are untrained where time does not depend on the weights. The conversions take twenty minutes.
    """
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := set(chosen) - {*PARTS, *ON_REQUEST}:
        known = ", ".join((*PARTS, *ON_REQUEST))
        raise ConfigError(
            f"no part of the bench is called {', '.join(sorted(unknown))}; choose from {known}",
            field="only",
        )
    comparison = Comparison(train_seconds, scene, factor)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    report = {**kept(out / "report.json"), "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="distillery-bench-") as scratch:
        for name in chosen:
            report[name] = _measured(name, Path(scratch) / name, seconds, steps, comparison)
    report["seconds"] = round(time.monotonic() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(markdown(report), encoding="utf-8")
        if "conversion" in report:
            (page.parent / PLOT).parent.mkdir(parents=True, exist_ok=True)
            save_plot(report["conversion"], page.parent / PLOT)
    if as_json:
        return emit_json(report)
    return _show(report, out)


def _measured(name: str, work: Path, seconds: float, steps: int, comparison: Comparison) -> Any:
    from benchmarks.conversion import measure_conversion, measure_stages
    from benchmarks.gpu import measure_gpu
    from benchmarks.radiance import measure_radiance
    from benchmarks.sampler import measure_sampler
    from benchmarks.trainer import measure_trainer

    if name == "steps":
        with bar("training steps") as line:
            return measure_trainer(work, steps, line.update)
    if name == "sampler":
        return measure_sampler(work, seconds, notes.print)
    if name == "rendering":
        return measure_radiance(work, seconds, notes.print)
    if name == "gpu":
        return measure_gpu(work, seconds, notes.print)
    if name == "stages":
        return measure_stages(work, notes.print)
    return measure_conversion(work, comparison, notes.print)


def kept(path: Path) -> dict[str, Any]:
    """An earlier report, whose parts stay where they are not measured anew."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def machine() -> dict[str, Any]:
    """Machine that the figures were measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _serving_rows(report: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for model in report.get("sampler", ()):
        best = model["bare"]
        how = f"bare ONNX Runtime, {best['sessions']} x batch {best['batch']}"
        rows.append([model["model"], how, "", best["images_per_s"], 1.0])
        for load in model["loads"]:
            what = f"sampler, {load['concurrency']} clients, {load['images_per_request']} images a request"
            rows.append([model["model"], what, f"{load['p50_ms']:.3g}", load["images_per_s"], load["ratio"]])
    return rows


def _training_rows(report: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for row in report.get("steps", ()):
        if "error" in row:
            rows.append([row["method"], row["batch_size"], *[""] * 5, row["error"]])
            continue
        ratio = float(row["step_over_passes"])
        counts = [f"{row[key]:g}" for key in ("forward_passes", "differentiated_passes")]
        times = [float(row["step_ms"]), float(row["passes_ms"]), ratio]
        rows.append([row["method"], row["batch_size"], *counts, *times, "PASS" if ratio <= LIMIT else "over"])
    return rows


SERVING_COLUMNS = ["model", "how", "p50 ms", "images/s", "of bare"]
STEP_COLUMNS = [
    "method",
    "batch",
    "passes",
    "with backward",
    "step ms",
    "bare passes ms",
    "step / passes",
    "",
]


def _tables(report: dict[str, Any]) -> list[tuple[str, str, list[str], list[list[Any]]]]:
    """Title, remark, columns and rows of each part that was measured."""
    steps = (
        "`passes` are calls without a gradient, `with backward` those with one; networks are diffusers networks,\n"
        "discriminator heads and whatever else a step calls. The same calls, repeated bare in the same run, take\n"
        f"`bare passes`. One thread, untrained networks of each method's own recipe; `PASS` is at most {LIMIT:g}."
    )
    sampler = (
        "Clients run on the server's own cores, so one-image requests to a network of a few microseconds measure\n"
        "gRPC and Python, not the network."
    )
    rendering = (
        "A trained hash-grid field. `dense` evaluates every sample inside the box; PSNR is against the closed form.\n"
        "The bare renderer runs a thread a core in the client's process, turn and turn about with the sampler."
    )
    conversion = (
        "PSNR on true pictures of {} that no field was trained on. An MLP from images is trained as published, with\n"
        "samples all along the rays, and with our occupancy grid too. Times are CPU seconds of training steps on one\n"
        f"thread; the teacher's own is shown, not hidden.\n\n![PSNR against seconds]({PLOT})"
    )
    entries = []
    if "sampler" in report:
        rows = _serving_rows(report)
        entries.append(("Sampler against the bare runtime", sampler, SERVING_COLUMNS, rows))
    if "gpu" in report:
        remark = (
            "Text encoder, UNet, VAE and JPEG of one picture; bare forwards are eager, one after the other."
        )
        entries.append(("Text to image on a GPU", remark, SERVING_COLUMNS, gpu_rows(report["gpu"])))
    if "rendering" in report:
        entries.append(("Rendering", rendering, COLUMNS, rendering_rows(report["rendering"])))
    if "conversion" in report:
        rows = conversion_rows(report["conversion"])
        remark = conversion.format(report["conversion"]["scene"])
        entries.append(("Converting a field against training one", remark, CONVERSION_COLUMNS, rows))
    if "stages" in report:
        remark = "A hash grid becomes a VM field in equal time; PSNR is against the teacher's own renders."
        rows = stage_rows(report["stages"])
        entries.append(("PVD's stages against pixels alone", remark, CONVERSION_COLUMNS, rows))
    if "steps" in report:
        rows = _training_rows(report)
        entries.append(("A training step against its network passes", steps, STEP_COLUMNS, rows))
    return entries


def _show(report: dict[str, Any], out: Path) -> None:
    for title, _, columns, rows in _tables(report):
        results.print(table(columns, rows, title=title))
    results.print(f"took {report['seconds']:.0f} s; report.json is in {out}")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page of documentation."""
    machine = report["machine"]
    about = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}"
    parts = [
        f"# Performance\n\nWritten by `make bench`; ratios are of one run.\n\nMachine: {about}.\n",
        *(
            f"## {title}\n\n{remark}\n\n{markdown_table(columns, rows)}"
            for title, remark, columns, rows in _tables(report)
        ),
    ]
    return "\n".join(parts)

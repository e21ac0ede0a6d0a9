"""`distillery bench`: server against bare runtime, training step against its network passes, in one run."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from distillery_cli.bench_trainer import LIMIT
from distillery_cli.output import AsJson, bar, emit_json, notes, results, table


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: distillery bench  ·  distillery bench --seconds 20 --out out/bench")(bench)


def bench(
    out: Annotated[Path, typer.Option("--out", help="Where report.json goes.")] = Path("out/bench"),
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Of load at each concurrency.")] = 5.0,
    page: Annotated[Path | None, typer.Option("--page", help="Write the tables as Markdown too.")] = None,
    steps: Annotated[int, typer.Option(min=3, max=10_000, help="Training steps that are timed.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Measure the sampler against a bare ONNX Runtime forward, each method's training step against its network passes.

    The networks are untrained: time does not depend on the weights.
    """
    from distillery_cli.bench_sampler import measure_sampler
    from distillery_cli.bench_trainer import measure_trainer

    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="distillery-bench-") as scratch:
        with bar("training steps") as line:
            training = measure_trainer(Path(scratch), steps, line.update)
        serving = measure_sampler(Path(scratch) / "state", seconds, notes.print)
    report = {
        "machine": _machine(),
        "sampler": serving,
        "trainer": training,
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(markdown(report), encoding="utf-8")
    if as_json:
        return emit_json(report)
    return _show(report, out)


def _machine() -> dict[str, Any]:
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
    for model in report["sampler"]:
        best = model["bare"]
        how = f"bare ONNX Runtime, {best['sessions']} x batch {best['batch']}"
        rows.append([model["model"], how, "", best["images_per_s"], 1.0])
        for load in model["loads"]:
            what = f"sampler, {load['concurrency']} clients, {load['images_per_request']} images a request"
            rows.append([model["model"], what, f"{load['p50_ms']:.3g}", load["images_per_s"], load["ratio"]])
    return rows


def _training_rows(report: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for row in report["trainer"]:
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


def _show(report: dict[str, Any], out: Path) -> None:
    results.print(table(SERVING_COLUMNS, _serving_rows(report), title="sampler"))
    title = f"training step against its bare network passes, at most {LIMIT:g}"
    results.print(table(STEP_COLUMNS, _training_rows(report), title=title))
    results.print(f"took {report['seconds']:.0f} s; report.json is in {out}")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page of documentation."""
    machine = report["machine"]
    lines = [
        "# Performance",
        "",
        "Written by `make bench`; every figure is of one run. Clients run on the server's own cores, so one-image",
        "requests to a network of a few microseconds measure gRPC and Python, not the network.",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}.",
        "",
        "## Sampler against the bare runtime",
        "",
        *_markdown_table(SERVING_COLUMNS, _serving_rows(report)),
        "",
        "## A training step against its network passes",
        "",
        "`passes` are calls without a gradient, `with backward` those with one; networks are diffusers networks,",
        "discriminator heads and whatever else a step calls. The same calls, repeated bare in the same run, take",
        f"`bare passes`. One thread, untrained networks of each method's own recipe; `PASS` is at most {LIMIT:g}.",
        "",
        *_markdown_table(STEP_COLUMNS, _training_rows(report)),
    ]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells]]

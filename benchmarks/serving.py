"""`python -m benchmarks serving`: the sampler beside the bare runtime and beside other servers, in one run."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.other_servers import FOLDER, KSERVE, PEERS, measure_peer
from benchmarks.overview import kept, machine
from benchmarks.processes import HERE, Asked, Child, Sampler, Served, bare, load, publish
from benchmarks.sampler import SUBJECTS, Subject
from benchmarks.verdict import (
    COLUMNS,
    PLOT,
    SERVER_COLUMNS,
    claim_rows,
    figures,
    markdown,
    save_plot,
    server_rows,
    verdicts,
)
from distill_core.errors import ConfigError, Unavailable
from distillery_cli.terminal.output import AsJson, emit_json, notes, results, table

PARTS = ("ours", "overload", "peers")
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
PEER_CONCURRENCY = (1, 4, 16, 64)
BATCHES = (1, 2, 4, 8, 16, 32)
SHARES = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.25, 2.0)  # of the bare limit, of the offered loads
ROUNDS = 7  # bare and server, turn and turn about
OVERLOAD = 4.0  # times the peak
OVERLOAD_TIMES = 4  # as long as other loads: refusals are measured by their slowest hundredth
DEADLINE_S = 0.25  # of every offered call
THREADS = 1  # of the model, everywhere
MEMORY = "memory.json"  # of `make prove-memory`, beside our own report
Say = Callable[[str], object]


def paired(lone: Asked, server: Asked, batch: int, concurrency: int, seconds: float) -> dict[str, Any]:
    """Bare forward and server turn and turn about: what a call costs above it, and what share of it is delivered."""
    rounds = []
    for _ in range(ROUNDS):
        forward = lone.ask(batch=1, seconds=seconds / 2)
        one = server.ask(kind="closed", concurrency=1, seconds=seconds)
        best = lone.ask(batch=batch, seconds=seconds / 2)
        many = server.ask(kind="closed", concurrency=concurrency, seconds=seconds)
        if not (one["ok"] and many["ok"]):
            raise Unavailable(f"no call was answered: {one['errors'] or many['errors']}")
        rounds.append(
            {
                "forward_p50_ms": forward["p50_ms"],
                "p50_ms": one["p50_ms"],
                "overhead_ms": one["p50_ms"] - forward["p50_ms"],
                "bare_images_per_s": best["images_per_s"],
                "images_per_s": many["images_per_s"],
                "ratio": many["images_per_s"] / best["images_per_s"],
            }
        )
    return {"rounds": rounds, **{key: statistics.median(r[key] for r in rounds) for key in rounds[0]}}


class Bench(NamedTuple):
    """Settings that every server of a run is measured with."""

    served: Served
    lone: Asked  # the bare runtime
    bare: dict[str, Any]  # its figures, see `scan`
    work: Path
    seconds: float
    parts: tuple[str, ...]
    is_main: bool
    say: Say


def measured(
    bench: Bench, name: str, server: Child, generator: Asked, *, callers: Sequence[int] = PEER_CONCURRENCY
) -> dict[str, Any]:
    """A server's closed loops at each number of callers, its best beside the bare runtime, then offered loads."""
    loads, seconds, say = [], bench.seconds, bench.say
    for concurrency in callers:
        used, began = server.cpu_seconds(), time.perf_counter()
        load = generator.ask(kind="closed", concurrency=concurrency, seconds=seconds)
        cores = (server.cpu_seconds() - used) / (time.perf_counter() - began)
        loads.append({"concurrency": concurrency, **load, "server_cores": cores})
        p50, rate = load["p50_ms"] or 0.0, load["images_per_s"]
        say(f"{name}: {concurrency} callers, p50 {p50:.2f} ms, {rate:.1f} images/s")
    best = max(loads, key=lambda row: row["images_per_s"])["concurrency"]
    beside = paired(bench.lone, generator, bench.bare["batch"], best, seconds)
    say(f"{name}: {beside['overhead_ms']:.2f} ms above the forward, {beside['ratio']:.3f} of its throughput")
    result = {"loads": loads, "best_concurrency": best, **beside}
    if "overload" in bench.parts and bench.is_main:
        result["curve"] = curve(generator, bench.bare["images_per_s"], seconds, name, say)
        result["overload"] = overloaded(server, generator, result["images_per_s"], seconds)
    return result


def curve(generator: Asked, limit: float, seconds: float, name: str, say: Say) -> list[dict[str, Any]]:
    """Offered loads as shares of the bare limit, Poisson arrivals, every call with the deadline."""
    rows = []
    for share in SHARES:
        rate = share * limit
        generator.ask(kind="settled")
        row = generator.ask(kind="offered", rate=rate, seconds=seconds, deadline_s=DEADLINE_S)
        rows.append({"share": share, **row})
        p50, p99 = row["p50_ms"] or 0.0, row["p99_ms"] or 0.0
        say(f"{name}: {rate:.0f} a second offered, p50 {p50:.2f} ms, p99 {p99:.2f} ms, {row['ok']} answered")
    return rows


def scan(lone: Asked, seconds: float) -> dict[str, Any]:
    """The bare runtime at each batch size, and the best of them."""
    rows = [lone.ask(batch=batch, seconds=seconds / 2) for batch in BATCHES]
    best = max(rows, key=lambda row: row["images_per_s"])
    return {"forward_p50_ms": rows[0]["p50_ms"], **best, "all": rows}


def overloaded(server: Child, generator: Asked, peak: float, seconds: float) -> dict[str, Any]:
    """Share of four times the peak that is accepted, and how fast the rest is refused."""
    generator.ask(kind="settled")
    used = server.cpu_seconds()
    row = generator.ask(
        kind="offered", rate=OVERLOAD * peak, seconds=OVERLOAD_TIMES * seconds, deadline_s=DEADLINE_S
    )
    return {
        **row,
        "deadline_s": DEADLINE_S,
        "peak_images_per_s": peak,
        "ratio": row["images_per_s"] / peak,
        "refused_per_s": row["refused"] / row["seconds"],
        "server_cores": (server.cpu_seconds() - used) / row["seconds"],
    }


def measure_subject(
    subject: Subject, work: Path, parts: tuple[str, ...], seconds: float, *, is_main: bool, say: Say
) -> dict[str, Any]:
    """Our server and, for the main subject, the others, each beside the bare runtime with the same graph."""
    say(f"{subject.name}: publishing, unless an earlier run did")
    served = publish(subject, work)
    with bare(served, THREADS, work) as lone:
        alone = scan(lone, seconds)
        say(
            f"{subject.name}: bare forward {alone['forward_p50_ms']:.2f} ms, {alone['images_per_s']:.1f} images/s "
            f"with {THREADS} thread"
        )
        bench = Bench(served, lone, alone, work, seconds, parts, is_main, say)
        found = {"model": subject.name, "bare": alone, **ours(bench)}
        if "peers" in parts and is_main:
            measure = partial(measured, bench)
            root = work.parent / "peers"
            rows = [measure_peer(peer, served, root, work, THREADS, measure, say) for peer in PEERS]
            found["peers"] = [row for variants in rows for row in variants]
    return found


def plain(bench: Bench, callers: int) -> dict[str, Any]:
    """Our server with graphs as they are in their files."""
    ref, work = bench.served.ref, bench.work
    with Sampler(ref, work, THREADS, DISTILLERY_SAMPLER_REWRITE_GRAPHS="false") as server:
        server.start_seconds()
        with load(sys.executable, HERE / "our_client.py", server.address, ref, work) as generator:
            row = paired(bench.lone, generator, bench.bare["batch"], callers, bench.seconds)
    return {"best_concurrency": callers, **row}


def ours(bench: Bench) -> dict[str, Any]:
    """Our server with one subject, and how long it took to say SERVING; beside others also by their client."""
    ref, work, name = bench.served.ref, bench.work, bench.served.subject.name
    with Sampler(ref, work, THREADS) as server:
        row: dict[str, Any] = {"start_s": server.start_seconds()}
        with load(sys.executable, HERE / "our_client.py", server.address, ref, work) as generator:
            row["ours"] = measured(bench, f"{name}, ours", server, generator, callers=CONCURRENCY)
        if "overload" in row["ours"]:
            with load(sys.executable, HERE / "stub_client.py", server.address, ref, work) as generator:
                peak = row["ours"]["images_per_s"]
                row["unlimited"] = overloaded(server, generator, peak, bench.seconds)
        if "peers" in bench.parts and bench.is_main and (FOLDER / KSERVE).exists():
            with load(sys.executable, FOLDER / KSERVE, server.address, ref, work) as generator:
                row["kserve"] = measured(bench, f"{name}, ours by tritonclient", server, generator)
    if bench.is_main:
        row["plain"] = plain(bench, row["ours"]["best_concurrency"])
    return row


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    program = "python -m benchmarks serving"
    app.command("serving", epilog=f"Examples: {program}  ·  {program} --only ours,overload --seconds 1")(
        bench_serving
    )


def bench_serving(
    out: Annotated[Path, typer.Option("--out", help="Where serving.json goes.")] = Path("out/bench"),
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Of each load.")] = 2.0,
    only: Annotated[str, typer.Option(help="Parts to measure; ours is always one.")] = ",".join(PARTS),
    page: Annotated[Path | None, typer.Option("--page", help="Write the tables as Markdown too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the sampler beside the bare runtime and beside other servers: latency, throughput, overload.

    Other servers are installed once, each into an environment of its own under --out (1.5 GB in all). A figure that
    misses what is wanted is shown as not holding; the exit code is 0 either way.
    """
    parts = tuple(name.strip() for name in only.split(",") if name.strip())
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(
            f"no part of the bench is called {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}",
            field="only",
        )
    began = time.monotonic()
    report = measure(
        SUBJECTS,
        out.absolute() / "serving",
        parts,
        seconds,
        lambda text: notes.print(text),
    )
    report["seconds"] = round(time.monotonic() - began, 1)
    (out / "serving.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    main = report["subjects"][-1]
    if page is not None:
        with_plot = "curve" in main["ours"]
        if with_plot:
            save_plot(main, page.parent / PLOT)
        page.write_text(markdown(report, with_plot=with_plot), encoding="utf-8")
    if as_json:
        return emit_json(report)
    results.print(table(SERVER_COLUMNS, server_rows(main), title=main["model"]))
    results.print(table(COLUMNS, claim_rows(report), title="what is wanted"))
    results.print(f"took {report['seconds']:.0f} s; serving.json is in {out}")
    return None


def measure(
    subjects: Sequence[Subject], work: Path, parts: tuple[str, ...], seconds: float, say: Say
) -> dict[str, Any]:
    """The whole report; the figures are of the last subject."""
    measured_all = [
        measure_subject(subject, work, parts, seconds, is_main=subject == subjects[-1], say=say)
        for subject in subjects
    ]
    found = figures(measured_all[-1], kept(work.parent / MEMORY))
    return {**found, "claims": verdicts(found), "machine": machine(), "subjects": measured_all}

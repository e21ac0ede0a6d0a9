"""What a run of `python -m benchmarks serving` says: its figures, what was wanted of them, the page and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from distillery_cli.terminal.output import markdown_table

PLOT = Path("images/serving.png")  # beside the page
OVERHEAD_MS, THROUGHPUT, OVERLOAD, REFUSAL_MS = 1.5, 0.95, 0.9, 5.0
PEER_THROUGHPUT, PEER_OVERHEAD, START_S, MEMORY = 1.2, 0.8, 3.0, 0.05
COLUMNS = ["what", "measured", "wanted", ""]


class Claim(NamedTuple):
    """A figure, and the bound it is to keep."""

    title: str
    figure: str
    at_most: bool
    bound: float | str  # a number, or the figure that holds it


CLAIMS = (
    Claim("p50 of one caller above the bare forward, ms", "p50_overhead_ms", True, OVERHEAD_MS),
    Claim("throughput, share of the bare runtime's", "throughput_ratio", False, THROUGHPUT),
    Claim("accepted at 4 x overload, share of the peak", "overload_throughput_ratio", False, OVERLOAD),
    Claim("p99 of the accepted at 4 x overload, ms", "overload_p99_ms", True, "overload_deadline_ms"),
    Claim("p99 of a refusal at 4 x overload, ms", "refusal_p99_ms", True, REFUSAL_MS),
    Claim("accepted at 4 x overload without our client", "unlimited_throughput_ratio", False, OVERLOAD),
    Claim("p99 of the accepted without our client, ms", "unlimited_p99_ms", True, "overload_deadline_ms"),
    Claim("p99 of a refusal without our client, ms", "unlimited_refusal_p99_ms", True, REFUSAL_MS),
    Claim("images/s, times the best other server's", "best_peer_throughput_ratio", False, PEER_THROUGHPUT),
    Claim("p50 above the forward, graphs not rewritten, ms", "plain_overhead_ms", True, OVERHEAD_MS),
    Claim("throughput, share of the bare, graphs not rewritten", "plain_throughput_ratio", False, THROUGHPUT),
    Claim(
        "times the best other server's, not rewritten", "plain_peer_throughput_ratio", False, PEER_THROUGHPUT
    ),
    Claim(
        "overhead of one caller, share of the best other's", "best_peer_overhead_ratio", True, PEER_OVERHEAD
    ),
    Claim("start to SERVING, s", "start_s", True, START_S),
    Claim("memory after requests and swaps, largest change (prove-memory)", "memory_change", True, MEMORY),
)


def figures(main: dict[str, Any], memory: dict[str, Any] | None = None) -> dict[str, float]:
    """The figures of the main subject, and of what `make prove-memory` left; what was not measured is left out."""
    ours = main["ours"]
    values = {
        "p50_overhead_ms": ours["overhead_ms"],
        "throughput_ratio": ours["ratio"],
        "start_s": main["start_s"],
    }
    if over := ours.get("overload"):
        values |= {
            "overload_throughput_ratio": over["ratio"],
            "overload_p99_ms": over["p99_ms"],
            "overload_deadline_ms": 1000 * over["deadline_s"],
            "refusal_p50_ms": over["refusal_p50_ms"],
            "refusal_p99_ms": over["refusal_p99_ms"],
        }
    if over := main.get("unlimited"):
        values |= {
            "unlimited_throughput_ratio": over["ratio"],
            "unlimited_p99_ms": over["p99_ms"],
            "unlimited_refusal_p99_ms": over["refusal_p99_ms"],
        }
    plain = main.get("plain")
    if plain:
        values |= {"plain_overhead_ms": plain["overhead_ms"], "plain_throughput_ratio": plain["ratio"]}
    answered = [peer for peer in main.get("peers", ()) if "error" not in peer]
    measured = [peer for peer in answered if peer["is_server"]]
    for alone in (peer for peer in answered if not peer["is_server"]):
        values["grpc_alone_overhead_ms"] = alone["overhead_ms"]
    if measured:  # each against the bare runtime of its own minute, so that the machine's moods cancel
        best = max(peer["ratio"] for peer in measured)
        values["best_peer_throughput_ratio"] = ours["ratio"] / best
        if plain:
            values["plain_peer_throughput_ratio"] = plain["ratio"] / best
        values["best_peer_overhead_ratio"] = ours["overhead_ms"] / min(
            peer["overhead_ms"] for peer in measured
        )
    if memory:
        values["memory_change"] = max(abs(curve["change"]) for curve in memory["memory"])
    return {name: value for name, value in values.items() if value is not None}


def verdicts(found: dict[str, float]) -> list[dict[str, Any]]:
    """Each claim that was measured: what was found, what was wanted, and whether it holds."""
    rows = []
    for claim in CLAIMS:
        bound = found.get(claim.bound) if isinstance(claim.bound, str) else claim.bound
        value = found.get(claim.figure)
        if value is None or bound is None:
            continue
        holds = value <= bound if claim.at_most else value >= bound
        bound_text = f"at {'most' if claim.at_most else 'least'} {bound:g}"
        rows.append({"claim": claim.title, "measured": value, "wanted": bound_text, "holds": holds})
    return rows


def claim_rows(report: dict[str, Any]) -> list[list[Any]]:
    """A line a claim."""
    return [
        [row["claim"], float(row["measured"]), row["wanted"], "PASS" if row["holds"] else "does not hold"]
        for row in report["claims"]
    ]


OVERLOAD_COLUMNS = [
    "at 4 x the peak, by",
    "images/s",
    "refused, 1/s",
    "p50 ms",
    "p99 ms",
    "refusal p50 ms",
    "refusal p99 ms",
    "server cores",
    "client cores",
]
LOAD_COLUMNS = ["callers", "p50 ms", "p99 ms", "images/s", "server cores", "client cores"]
SERVER_COLUMNS = ["server", "p50 above its forward, ms", "images/s", "of bare", "callers", "how"]


def load_rows(loads: list[dict[str, Any]]) -> list[list[Any]]:
    """A line a closed loop."""
    keys = ("p50_ms", "p99_ms", "images_per_s", "server_cores", "client_cores")
    return [[row["concurrency"], *(float(row[key] or 0) for key in keys)] for row in loads]


def overload_rows(subject: dict[str, Any]) -> list[list[Any]]:
    """A line a client under overload."""
    keys = ("images_per_s", "refused_per_s", "p50_ms", "p99_ms", "refusal_p50_ms", "refusal_p99_ms")
    rows = {"our client": subject["ours"].get("overload"), "bare gRPC stubs": subject.get("unlimited")}
    return [
        [name, *(float(row[key] or 0) for key in (*keys, "server_cores", "client_cores"))]
        for name, row in rows.items()
        if row
    ]


def server_rows(subject: dict[str, Any]) -> list[list[Any]]:
    """A line a server, ours first."""
    ours = {"name": "Distillery", "remark": "gRPC, distillery.v1", **subject["ours"]}
    others = {
        "plain": {"name": "Distillery, graphs not rewritten", "remark": "gRPC, distillery.v1"},
        "kserve": {"name": "Distillery, KServe v2", "remark": "tritonclient over gRPC"},
    }
    own = [{**row, **subject[key]} for key, row in others.items() if key in subject]
    rows = []
    for row in (ours, *own, *subject.get("peers", ())):
        if "error" in row:
            rows.append([row["name"], "", "", "", "", row["error"]])
            continue
        values = [float(row[key]) for key in ("overhead_ms", "images_per_s", "ratio")]
        rows.append([row["name"], *values, row["best_concurrency"], row["remark"]])
    return rows


def markdown(report: dict[str, Any], *, with_plot: bool) -> str:
    """The report as a page of documentation."""
    machine = report["machine"]
    parts = [
        "# Performance of serving",
        "Written by `make bench-serving`; every ratio is of one run, bare runtime and server turn and turn about. One\n"
        "model thread everywhere, no process pinned; the load generator is a process of its own on the same cores and\n"
        "counts latency from the moment a call was due.",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}.",
        markdown_table(COLUMNS, claim_rows(report)).strip(),
    ]
    if with_plot:
        parts.append(f"![Latency against offered load]({PLOT})")
    for subject in report["subjects"]:
        bare = subject["bare"]
        parts += [
            f"## {subject['model']}",
            f"The bare forward takes {bare['forward_p50_ms']:.3g} ms (p50, one image); at its best batch, "
            f"{bare['batch']}, the runtime makes {bare['images_per_s']:.4g} images/s.",
            markdown_table(SERVER_COLUMNS, server_rows(subject)).strip(),
            markdown_table(LOAD_COLUMNS, load_rows(subject["ours"]["loads"])).strip(),
        ]
        if "plain" in subject:
            parts.append(
                "The sampler rewrites graphs as it loads them (`backends/rewriting.py`), so what it runs takes less\n"
                "time than the bare forward of the file, which it is compared with. Lines that say so are without it."
            )
        if rows := overload_rows(subject):
            parts += [
                "Our client keeps no more calls in flight than the server takes; what is above that it ends itself,\n"
                "which counts here as refused. Bare gRPC stubs send all, and the server refuses.",
                markdown_table(OVERLOAD_COLUMNS, rows).strip(),
            ]
    return "\n\n".join(parts) + "\n"


def save_plot(subject: dict[str, Any], path: Path) -> None:
    """p50 and p99 against offered load, every server that was offered loads, beside the bare runtime's limit."""
    from distillery_cli.stack.demo_report import pyplot_without_display

    pyplot = pyplot_without_display()
    figure, axis = pyplot.subplots(figsize=(10, 5), layout="constrained")
    ours = {"name": "Distillery", **subject["ours"]}
    shown = [row for row in (ours, *subject.get("peers", ())) if row.get("curve")]
    for number, row in enumerate(shown):
        for key, style in (("p50_ms", "-"), ("p99_ms", "--")):
            points = [(load["offered"], load[key]) for load in row["curve"] if load[key]]
            label = f"{row['name']}, {key[:3]}"
            axis.plot(*zip(*points, strict=True), style, color=f"C{number}", marker=".", label=label)
    axis.axvline(subject["bare"]["images_per_s"], color="black", linewidth=1, label="bare runtime's limit")
    axis.set(xlabel="offered, images a second", ylabel="latency of the accepted, ms", yscale="log")
    figure.legend(fontsize="small", loc="outside right upper")
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

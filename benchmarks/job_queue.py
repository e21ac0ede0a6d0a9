"""`python -m benchmarks queue`: what a claim, a list and a watch cost as the queue grows, on each database.

The cost is the processor time of this process and of the database's together, so that a busy machine changes little.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.overview import machine
from distill_core.errors import ConfigError
from distill_core.files.paths import url_of
from distillery_cli.terminal.output import AsJson, emit_json, markdown_table, notes, results, table

if TYPE_CHECKING:
    from distill_service.jobs.database import Database

SIZES = (100, 1_000, 10_000, 100_000)
LIMIT = 2.0  # of the cost at the largest size over that at the smallest
JUDGED = ("claim", "list", "list page", "list state", "list label", "list time", "watch")
REPORT, PLOT, PAGE_PLOT = "queue.json", "queue.png", "images/queue.png"
Operation = Callable[[], object]
EXIT_TOO_SLOW = 1


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("queue", epilog="Example: python -m benchmarks queue --rounds 50 --out out/bench")(
        bench_queue
    )


def bench_queue(
    out: Annotated[Path, typer.Option("--out", help=f"Where {REPORT} and {PLOT} go.")] = Path("out/bench"),
    rounds: Annotated[int, typer.Option(min=3, max=10_000, help="Of each operation, at each size.")] = 30,
    largest: Annotated[
        int, typer.Option(min=200, max=10_000_000, help="Jobs of the longest queue.")
    ] = 100_000,
    page: Annotated[Path | None, typer.Option("--page", help="Write the tables as Markdown too.")] = None,
    as_json: AsJson = False,
) -> int:
    """Measure claim, list and watch at 100, 1,000, 10,000 and 100,000 jobs, on SQLite and, if there is one, PostgreSQL.

    Exits with 1 if one of them costs more than twice as much at the largest size as at the smallest.
    """
    sizes = [size for size in SIZES if size < largest] + [largest]
    report: dict[str, Any] = {"sizes": sizes, "rounds": rounds, "limit": LIMIT, "databases": {}}
    report["machine"] = machine()
    for name, opened in (("sqlite", _sqlite), ("postgresql", _postgresql)):
        with opened() as urls:
            if urls is not None:
                notes.print(f"{name}: filling queues of {', '.join(map(str, sizes))} jobs")
                report["databases"][name] = _measured(urls, sizes, rounds)
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _save_plot(report, out / PLOT)
    if page is not None:
        page.write_text(markdown(report), encoding="utf-8")
        _save_plot(report, page.parent / PAGE_PLOT)
    if as_json:
        emit_json(report)
    else:
        _show(report, out)
    return 0 if all(row["holds"] for rows in report["databases"].values() for row in rows) else EXIT_TOO_SLOW


@contextlib.contextmanager
def _sqlite() -> Iterator[Callable[[int], str] | None]:
    with tempfile.TemporaryDirectory(prefix="distillery-bench-queue-") as folder:
        yield lambda size: url_of("sqlite", f"/{folder}/{size}.db")


@contextlib.contextmanager
def _postgresql() -> Iterator[Callable[[int], str] | None]:
    from tools.temporary_postgres import initdb, temporary_postgres

    if initdb() is None:
        notes.print("PostgreSQL is not installed; it is left out")
        yield None
        return
    import psycopg

    with temporary_postgres() as url:

        def schema(size: int) -> str:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f"CREATE SCHEMA jobs_{size}".encode())
            return f"{url}&options=-csearch_path%3Djobs_{size}"

        yield schema


def _measured(urls: Callable[[int], str], sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each operation: the median of its cost in ms at each size."""
    from distill_service.jobs.database import Database

    with contextlib.ExitStack() as stack:
        operations = {}
        for size in sizes:
            database = Database.open(urls(size))
            stack.callback(database.close)
            _fill(database, size)
            operations[size] = _operations(database, size)
        cost = _processor_time(database)
        costs: dict[str, dict[int, list[float]]] = {}
        for turn in range(rounds + 1):
            for (
                size,
                named,
            ) in operations.items():  # by turns: a machine that slows down does so for all sizes
                for name, operation in named.items():
                    before = cost()
                    operation()
                    if turn:  # the first fills caches
                        costs.setdefault(name, {}).setdefault(size, []).append(cost() - before)
    return [_row(name, found) for name, found in costs.items()]


def _processor_time(db: Database) -> Callable[[], float]:
    """A clock that counts the seconds that this process and a PostgreSQL server's compute."""
    if db.engine.dialect.name != "postgresql":
        return time.process_time
    import psutil
    from sqlalchemy import text

    with db.read() as session:
        backend = int(session.scalar(text("SELECT pg_backend_pid()")) or 0)
    backends = psutil.Process(psutil.Process(backend).ppid()).children()  # all are connected by now
    return lambda: time.process_time() + sum(map(_computed, backends))


def _computed(process: Any) -> float:
    try:  # in nanoseconds, where the usual figures come in hundredths of a second
        return int(Path(f"/proc/{process.pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _row(name: str, costs: dict[int, list[float]]) -> dict[str, Any]:
    ms = {size: 1000 * statistics.median(taken) for size, taken in costs.items()}
    ratio = ms[max(ms)] / ms[min(ms)]
    judged = name in JUDGED
    return {
        "operation": name,
        "ms": ms,
        "ratio": ratio,
        "judged": judged,
        "holds": not judged or ratio <= LIMIT,
    }


def _fill(db: Database, size: int) -> None:
    """Mostly jobs that wait, of three priorities; every tenth for a parent, a few that run or have ended."""
    from sqlalchemy import insert, text

    from distill_service.jobs.specs import draft_train
    from distill_service.jobs.table import Event, Job, Label, Parent

    spec = draft_train(name="dmd2").spec
    with db.write() as session:
        for start in range(0, size, 2_000):
            numbers = range(start, min(start + 2_000, size))
            jobs = [_job(number, spec) for number in numbers]
            session.execute(insert(Job), jobs)
            event = {"attempt": 0, "what": "submitted", "message": "", "who": "bench"}
            events = [
                {**event, "job_id": job["id"], "state": job["state"], "time": job["created"]} for job in jobs
            ]
            session.execute(insert(Event), events)
            labels = [{**_at(job), "key": "team", "value": f"{job['seq'] % 50}"} for job in jobs]
            session.execute(insert(Label), labels)
            waiting = [job for job in jobs if job["waits"]]
            parents = [{"job_id": job["id"], "parent_id": f"{job['seq'] - 2:012x}"} for job in waiting]
            if parents:
                session.execute(insert(Parent), parents)
    if db.engine.dialect.name == "postgresql":
        with db.write() as session:
            session.execute(
                text("SELECT setval(pg_get_serial_sequence('jobs', 'seq'), :last)"), {"last": size + 1}
            )
            session.execute(text("ANALYZE"))  # which the server does by itself after a while


def _at(job: dict[str, Any]) -> dict[str, Any]:
    return {"job_id": job["id"], "created": job["created"], "seq": job["seq"]}


def _job(number: int, spec: dict[str, Any]) -> dict[str, Any]:
    state = {7: "RUNNING", 13: "SUCCEEDED", 17: "FAILED"}.get(number % 100, "QUEUED")
    created = time.time() - 1e6 + number
    never = {"worker": "", "lease_until": 0.0, "progress": {}, "metrics": {}, "artifact": "", "error": {}}
    counts = {"attempt": 0, "crashes": 0, "max_attempts": 3, "not_before": 0.0, "cancel_requested": False}
    texts = {
        "name": "digits",
        "kind": "train",
        "queue": "train",
        "stage": "",
        "owner": "",
        "request_sha256": "",
    }
    times = {"created": created, "started": None, "finished": None}
    if state == "RUNNING":
        never |= {"lease_until": time.time() + 1e6, "progress": {"step": 10, "steps": 2000}}
    waits = int(number % 10 == 9 and state == "QUEUED")
    own = {"seq": number + 1, "id": f"{number + 1:012x}", "state": state, "spec": spec, "waits": waits}
    return {
        **never,
        **counts,
        **texts,
        **times,
        **own,
        "labels": {"team": f"{(number + 1) % 50}"},
        "priority": number % 3,
    }


def _operations(db: Database, size: int) -> dict[str, Operation]:
    from distill_service.jobs import queue, requests
    from distill_service.jobs.listing import Filters, list_jobs
    from distill_service.jobs.queue import Outcome
    from distill_service.jobs.specs import draft_train
    from distill_service.jobs.table import State
    from distill_service.jobs.watch import Options, Watch

    def claim() -> object:
        return queue.claim(db, ["train", "eval"], worker="bench", lease_s=600)

    def give_back() -> None:
        with db.read() as session:
            taken = session.scalars(_taken()).one()
        queue.finish(db, taken.id, taken.attempt, Outcome("preempted"))

    def watch() -> None:
        watched = Watch(db, Path("/nowhere"), f"{size // 2:012x}", Options())
        while watched.look():
            pass

    some = draft_train(name="dmd2")
    middle = requests.get(db, f"{size // 2:012x}").job.created
    around = Filters(created_after=middle - 20, created_before=middle + 20)
    running, team = Filters(states=[State.RUNNING]), Filters(labels={"team": "7"})
    _, second = list_jobs(db, page_size=20)
    _, deep = list_jobs(db, Filters(created_before=middle), page_size=20)
    return {
        "claim": claim,
        "finish": give_back,
        "list": lambda: list_jobs(db, page_size=20),
        "list page": lambda: (
            list_jobs(db, Filters(created_before=middle), page_size=20, page_token=deep)
            if deep
            else list_jobs(db, page_size=20, page_token=second)
        ),
        "list state": lambda: list_jobs(db, running, page_size=20),
        "list label": lambda: list_jobs(db, team, page_size=20),
        "list time": lambda: list_jobs(db, around, page_size=20),
        "watch": watch,
        "submit": lambda: requests.submit(db, [some], requests.Options(priority=-1)),
        "reap": lambda: queue.reap(db),
    }


def _taken() -> Any:
    from sqlalchemy import select

    from distill_service.jobs.table import Job

    return select(Job).where(Job.worker == "bench", Job.state == "RUNNING", Job.kind == "train")


def _cells(report: dict[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    """One database's table: its head and its rows."""
    columns = ["operation", *(f"{size:,} jobs" for size in report["sizes"]), "last over first", ""]
    rows = [
        [
            row["operation"],
            *(f"{row['ms'][size]:.2f} ms" for size in report["sizes"]),
            f"{row['ratio']:.2f}",
            ("holds" if row["holds"] else f"more than {LIMIT:g}") if row["judged"] else "",
        ]
        for row in report["databases"][name]
    ]
    return columns, rows


def _show(report: dict[str, Any], out: Path) -> None:
    for name in report["databases"]:
        columns, rows = _cells(report, name)
        title = f"{name}, medians of {report['rounds']} rounds, processor time"
        results.print(table(columns, rows, title=title))
    results.print(f"written: {out / REPORT}, {out / PLOT}")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page of documentation."""
    on = report["machine"]
    about = f"{on['cpu']}, {on['cores']} cores, {on['system']}, Python {on['python']}"
    parts = [
        "# Performance of the queue\n\nWritten by `make bench-queue`: what an operation costs as the job table grows, "
        "in processor time of the process\nand its database together, the median of "
        f"{report['rounds']} rounds. Claims, lists and watches must not cost more than {LIMIT:g}\ntimes as much in "
        "the longest queue as in the shortest."
        f"\n\nMachine: {about}.\n\n![Cost against length]({PAGE_PLOT})\n",
        *(f"## {name}\n\n{markdown_table(*_cells(report, name))}" for name in report["databases"]),
    ]
    return "\n".join(parts)


def _save_plot(report: dict[str, Any], path: Path) -> None:
    from distillery_cli.stack.demo_report import pyplot_without_display

    if not report["databases"]:
        raise ConfigError("no database was measured", field="databases")
    pyplot = pyplot_without_display()
    count = len(report["databases"])
    figure, axes = pyplot.subplots(1, count, figsize=(6 * count, 4.5), layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], report["databases"].items(), strict=True):
        for row in rows:
            style = "-o" if row["judged"] else ":"
            axis.plot(list(row["ms"]), list(row["ms"].values()), style, label=row["operation"])
        axis.set(
            xscale="log", yscale="log", xlabel="jobs in the table", ylabel="ms of processor time", title=name
        )
        axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""`distillery methods`, `train` and `check`: training in this process, without the queue."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shlex
import signal
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import EXIT_STOPPED, DistilleryError, Unavailable
from distill_core.recipe import Recipe, load_recipe, parse_overrides
from distillery_cli.terminal.output import (
    AsJson,
    Overrides,
    StoreUrl,
    bar,
    emit_json,
    figure,
    notes,
    results,
    styled,
    table,
    waiting,
)

if TYPE_CHECKING:
    from distill_core.context import Context

EXIT_CHECK_FAILED = 1


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: distillery methods  ·  distillery methods dmd2 --schema")(methods)
    app.command(
        epilog="Examples: distillery train edm_digits  ·  distillery train dmd2 -s steps=200 --out out/run"
        "  ·  all keys: distillery reference  ·  of a folder of pictures: distillery reference data.images"
    )(train)
    app.command(epilog="Examples: distillery check dmd2  ·  distillery check dmd2 --json")(check)


def methods(
    name: Annotated[str | None, typer.Argument(help="A method's name; without it, all of them.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="The JSON schema of the method's recipes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one of them."""
    with _quiet(as_json or schema, "looking at the methods"):
        from distill_core import api
        from distill_core.errors import ConfigError, NotFound, nearest

        described = api.describe_methods()
    if name is None:
        if schema:
            raise ConfigError(
                "--schema needs a method's name, e.g. distillery methods dmd2 --schema", field="name"
            )
        return emit_json(described) if as_json else _show_methods(described)
    matches = [entry for entry in described if entry["name"] == name]
    if not matches:
        raise NotFound(
            f"no method is called {name!r}{nearest(name, [e['name'] for e in described])}", field="name"
        )
    if schema:
        return emit_json(recipe_schema(name))
    return emit_json(matches[0]) if as_json else _show_method(matches[0])


def _show_methods(described: list[dict[str, Any]]) -> None:
    rows = [[e["name"], e["family"], ", ".join(e["needs"]), *_recipes(e), e["paper"]] for e in described]
    columns = ["method", "family", "needs", "recipes", "for your model", "paper"]
    prose = ["needs", "recipes", "for your model", "paper"]
    results.print(table(columns, rows, prose=prose, spare=["paper", "needs"]))


def _recipes(entry: dict[str, Any]) -> list[str]:
    """Those that bring their teacher, and those with published settings for a teacher of the user's."""
    return [", ".join(entry["recipes"]), ", ".join(entry["model_recipes"])]


def _show_method(entry: dict[str, Any]) -> None:
    import inspect
    import sys

    from distill_core.methods import find_method

    results.print(inspect.cleandoc(sys.modules[find_method(entry["name"]).__module__].__doc__ or ""))
    for key in ("family", "paper", "needs", "recipes"):
        value = entry[key]
        results.print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    for recipe, title in entry["model_recipes"].items():
        results.print(f"for a {title} of yours: {recipe}")


def recipe_schema(name: str) -> dict[str, Any]:
    """The JSON schema of a recipe of this method: the common keys, and its own under `config`."""
    from distill_core.methods import find_method

    schema = Recipe.model_json_schema()
    config = find_method(name).Config.model_json_schema()
    schema.setdefault("$defs", {}).update(config.pop("$defs", {}))
    schema["properties"]["config"] = config
    schema["properties"]["method"] = {"const": name}
    return schema


def local_context(store: str | None = None) -> Context:
    """The store at this URL, or the one that the settings name, and their cache."""
    from distill_core import api
    from distill_service.settings import settings

    return api.context(store or settings().store_url, settings().cache_dir)


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .toml file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; one that exists is resumed.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what memory it needs.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> int:
    """Train as RECIPE says, in this process, and say where the result is. Ctrl-C stops with a checkpoint."""
    loaded = load_recipe(recipe, parse_overrides(overrides or []))
    if dry_run:
        from distillery_cli.training.memory_table import show_plan

        with _quiet(as_json, "planning"):
            from distill_core import api

            plan = api.plan(loaded, local_context(store))
        return show_plan(plan, as_json=as_json)
    folder = (out or _new_folder(recipe)).absolute()
    with _quiet(False, "loading"):
        from distill_core import api

        context = local_context(store)
    with _alone_in(folder), _stop_on_signals() as stopped, bar(Path(recipe).stem, loaded.steps) as line:
        _say_changes(folder, loaded)
        result = api.train(loaded, folder, context, listener=line.tell, should_stop=stopped)
    if result.stopped:
        again = [recipe, *(part for given in overrides or [] for part in ("-s", given)), "--out", str(folder)]
        again += ["--store", store] if store else []
        note = f"stopped at step {result.step}; continue with: distillery train {shlex.join(again)}"
        notes.print(note)
        return EXIT_STOPPED
    published = result.manifest.ref if result.manifest else None
    model = folder / "model"
    if as_json:
        outcome = {"artifact": published, "metrics": result.figures, "measured_with": result.measured_with}
        emit_json({"folder": str(folder), "model": str(model), **outcome})
        return 0
    word = "nothing new: this run was published before, as" if result.again else "published:"
    results.print(f"model: {model}" + (f"\n{word} {published}" if published else ""))
    for name, value in result.figures.items():
        results.print(f"  {name} = {figure(value)}")
    for name, words in result.measured_with.items():
        results.print(f"{name}: {words}")
    return 0


def _new_folder(recipe: str) -> Path:
    from distill_service.settings import settings

    moment = time.strftime("%Y%m%d-%H%M%S")
    return (
        settings().runs / f"{Path(recipe).stem}-{moment}-{secrets.token_hex(2)}"
    )  # two may begin in one second


def _say_changes(folder: Path, recipe: Recipe) -> None:
    """Resuming with another recipe is allowed, e.g. for more steps, but not silent."""
    from distill_core.training.checkpoint import complete_checkpoints

    if not complete_checkpoints(folder / "checkpoints"):
        return
    try:
        before = Recipe.parse(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError, DistilleryError):  # by an older release, or damaged
        return
    changed = [f"{key} = {old}, now {new}" for key, (old, new) in recipe.differences(before).items()]
    if changed:
        message = f"goes on in {folder}, which was begun with {'; '.join(changed)}; give another --out to begin anew"
        notes.print(message)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, the one that workers take too: two trainings would mix their checkpoints."""
    from distill_core.training.checkpoint import writing

    with writing(f"to the run folder {folder}", folder / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                f"another process trains in {folder}; wait for it, or give another --out", field="out"
            ) from None
        yield


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """A flag that Ctrl-C or SIGTERM raises; a second Ctrl-C interrupts at once."""
    seen: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
        notes.print("stopping after this step; a checkpoint will be written")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> int:
    """Test a recipe's claim against the same recipe with its key part off. Exits with 0 only if it holds.

    The last line of stdout is one JSON object: name, passed, metric, measured, reference, ablation, also,
    seconds, figures.
    """
    load_recipe(name)  # a wrong name is answered before torch is loaded
    with _quiet(False, "loading, and training the teacher if no run has yet"):
        from distill_core import api

        context = local_context(store)
    with bar(f"check {name}") as line:
        verdict = api.check(name, context, listener=line.tell)
    if not as_json:
        _show_verdict(verdict)
    emit_json(verdict)
    return 0 if verdict["passed"] else EXIT_CHECK_FAILED


def _show_verdict(verdict: dict[str, Any]) -> None:
    for claim in (verdict, *verdict["also"]):
        shown = [
            f"{key} {figure(claim[key])}"
            for key in ("measured", "reference", "ablation")
            if claim[key] is not None
        ]
        notes.print(f"{claim['metric']}: {', '.join(shown)}")
    word = ("holds", "green") if verdict["passed"] else ("does not hold", "red")
    notes.print(styled(f"{verdict['name']}: the claim ", word))


@contextlib.contextmanager
def _quiet(silent: bool, text: str) -> Iterator[None]:
    with contextlib.nullcontext() if silent else waiting(text):
        yield

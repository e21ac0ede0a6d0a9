"""Training: a recipe runs in a folder, its result is saved, measured and, if the recipe says so, published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.building import build, for_its_teacher
from distill_core.context import Context
from distill_core.data import Source
from distill_core.method import Method
from distill_core.recipe import Recipe
from distill_core.running.evaluate import evaluator_of, figures_of
from distill_core.running.keys import MEASURED_WITH, move_alias, run_key
from distill_core.running.listeners import (
    StoppedWhilePreparing,
    cpu_threads,
    current_should_stop,
    listening,
    preparing,
)
from distill_core.running.publish import publish, save_models
from distill_core.training.checkpoint import writing
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Listener, Run


@dataclass(frozen=True)
class Result:
    """Result of a training run: its folder, its model's folder, its figures; `stopped` if it did not finish."""

    folder: Path
    step: int
    stopped: bool
    figures: dict[str, float] = field(default_factory=dict)
    measured_with: dict[str, str] = field(default_factory=dict)  # what the figures rest on, in words
    manifest: Manifest | None = None
    main: bool = True  # of a run in several processes: the one that saves, measures and publishes
    again: bool = False  # the run had been finished and published before: nothing is new


def context(store: ArtifactStore | str | Path, cache: Path) -> Context:
    """The context of recipes: a store, and a cache of models trained from recipes, which teachers come from."""
    opened = store if isinstance(store, ArtifactStore) else ArtifactStore(store)

    def train_into(recipe: Recipe, folder: Path) -> Path:
        inner = recipe.model_copy(update={"publish": None, "evaluate": {}})
        stop = current_should_stop.get()
        if train(inner, folder, new_context, listener=preparing(recipe), should_stop=stop).stopped:
            raise StoppedWhilePreparing
        return folder / "model"

    new_context = Context(opened, cache, train_into)
    return new_context


def train(
    recipe: Recipe,
    folder: Path,
    context: Context,
    *,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    job: str = "",
) -> Result:
    """Run a recipe in `folder`, resuming what is there; evaluate, save and (if the recipe says so) publish the result.

    Raises:
        DistilleryError: a mistake in the recipe or its data, a diverged loss, a store that cannot be written.
    """
    try:
        with listening(listener, should_stop), cpu_threads(recipe.threads):
            return _train(recipe, Run(folder, listener), context, should_stop, job)
    except StoppedWhilePreparing:
        return Result(folder, 0, stopped=True)


def prepare(
    recipe: Recipe,
    context: Context,
    *,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Make what `recipe` needs first (teachers by their recipes, pairs); False if it was stopped on the way."""
    try:
        with listening(listener, should_stop), cpu_threads(recipe.threads):
            method, source = build(recipe, context)
            evaluator_of(method, source, recipe, context)
    except StoppedWhilePreparing:
        return False
    return True


def missing_first(recipe: Recipe, context: Context, listener: Listener | None) -> None:
    """Train what `recipe` and its evaluation need and the cache does not have."""
    with listening(listener, current_should_stop.get()):
        method, source = build(recipe, context)
        evaluator_of(method, source, recipe, context)


def _train(recipe: Recipe, run: Run, context: Context, should_stop: Callable[[], bool], job: str) -> Result:
    recipe = for_its_teacher(recipe, context)
    method, source = build(recipe, context)
    run.write_recipe(recipe)
    evaluator = evaluator_of(method, source, recipe, context)  # a mistake in it is said before the training
    trainer = Trainer(method, source, recipe, run)
    skipped = getattr(source.pixels, "skipped", 0)  # damaged pictures that the data was told to leave out
    if skipped and trainer.strategy.keeps:
        run.metrics(0, {"skipped_pictures": skipped})
    outcome = trainer.train(should_stop)
    if outcome.stopped:
        return Result(run.folder, outcome.step, stopped=True)
    with trainer.averaged():
        if not trainer.strategy.keeps:
            return Result(run.folder, outcome.step, False, main=False)
        key = job or run_key(run, recipe)
        if recipe.publish and (known := context.store.published_with(recipe.publish.name, key)):
            move_alias(known, recipe, context, key)
            return _known(run, known)
        return _finished(method, source, recipe, run, context, evaluator, key)


def _finished(
    method: Method,
    source: Source,
    recipe: Recipe,
    run: Run,
    context: Context,
    evaluator: object,
    job: str,
) -> Result:
    """Save, measure and publish what was trained."""
    with writing(f"the model to {run.model}", run.checkpoints):
        save_models(method, source, recipe, run)
    measured = figures_of(method, recipe, evaluator)
    run.charts(measured.pictures)
    if skipped := getattr(source.pixels, "skipped", 0):
        measured.figures["skipped_pictures"] = float(skipped)
    metrics = measured.figures | {MEASURED_WITH + name: words for name, words in measured.rests_on.items()}
    manifest = publish(method, recipe, run, context, metrics, job=job) if recipe.publish else None
    return Result(
        run.folder,
        recipe.steps,
        False,
        figures=measured.figures,
        measured_with=measured.rests_on,
        manifest=manifest,
    )


def _known(run: Run, manifest: Manifest) -> Result:
    """The result of a run that was finished and published before."""
    grounds = {name: value for name, value in manifest.metrics.items() if name.startswith(MEASURED_WITH)}
    figures = {name: float(value) for name, value in manifest.metrics.items() if name not in grounds}
    words = {name.removeprefix(MEASURED_WITH): str(value) for name, value in grounds.items()}
    return Result(run.folder, manifest.step, False, figures, words, manifest, again=True)

"""What Distillery does, as functions: train, evaluate, publish, load, check. Services and commands call these."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.building import Context, build, load_model
from distill_core.checking import verdict
from distill_core.config import EvaluateConfig, Recipe, load_recipe, recipe_names
from distill_core.data import Source, build_source
from distill_core.errors import ConfigError, DistilleryError
from distill_core.evaluation import generator_figures, one_step
from distill_core.method import Method
from distill_core.methods import family, find_method, method_names, needs
from distill_core.metrics.judge import Judge, load_judge
from distill_core.networks.denoiser import Denoiser
from distill_core.pictures import save_sheet
from distill_core.training.checkpoint import writing
from distill_core.training.loop import Trainer
from distill_core.training.run import Listener, Run

__all__ = ["Result", "check", "context", "describe_methods", "evaluate", "load", "publish", "train"]
log = logging.getLogger(__name__)
_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)


class _StoppedOnTheWay(Exception):
    """A stop was asked for while a teacher or judge was trained first; its checkpoint is written."""


@dataclass(frozen=True)
class Result:
    """What a training run left: its folder, its model's folder, its figures; `stopped` if it did not finish."""

    folder: Path
    step: int
    stopped: bool
    figures: dict[str, float] = field(default_factory=dict)
    manifest: Manifest | None = None


def context(store: ArtifactStore | str | Path, cache: Path) -> Context:
    """Where recipes find their teachers: a store, and a cache of models trained from recipes."""
    opened = store if isinstance(store, ArtifactStore) else ArtifactStore(store)

    def train_into(recipe: Recipe, folder: Path) -> Path:
        inner = recipe.model_copy(update={"publish": None, "evaluate": EvaluateConfig()})
        if train(inner, folder, here, should_stop=_should_stop.get()).stopped:
            raise _StoppedOnTheWay
        return folder / "model"

    here = Context(opened, cache, train_into)
    return here


def train(
    recipe: Recipe,
    folder: Path,
    where: Context,
    *,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    job: str = "",
) -> Result:
    """Run a recipe in `folder`, resuming what is there; evaluate, save and (if the recipe says so) publish the result.

    Raises:
        DistilleryError: a mistake in the recipe or its data, a diverged loss, a store that cannot be written.
    """
    outer = _should_stop.set(should_stop)
    try:
        with _threads(recipe.threads):
            return _train(recipe, Run(folder, listener), where, should_stop, job)
    except _StoppedOnTheWay:
        return Result(folder, 0, stopped=True)
    finally:
        _should_stop.reset(outer)


def _train(recipe: Recipe, run: Run, where: Context, should_stop: Callable[[], bool], job: str) -> Result:
    method, source = build(recipe, where)
    run.write_recipe(recipe)
    judge = _judge(method, source, recipe.evaluate, where)
    trainer = Trainer(method, source, recipe, run)
    outcome = trainer.train(should_stop)
    if outcome.stopped:
        return Result(run.folder, outcome.step, stopped=True)
    with trainer.averaged():
        with writing(f"the model to {run.model}"):
            _save_model(method, recipe, run)
        figures = _figures(method, source, recipe.evaluate, judge)
        manifest = publish(method, recipe, run, where, figures, job=job) if recipe.publish else None
    return Result(run.folder, outcome.step, stopped=False, figures=figures, manifest=manifest)


def _save_model(method: Method, recipe: Recipe, run: Run) -> None:
    method.save_result(run.model)
    pictures = method.preview(recipe.seed)
    if pictures is not None:
        save_sheet(pictures, run.model / "preview.png")
    (run.model / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")


def publish(
    method: Method, recipe: Recipe, run: Run, where: Context, figures: dict[str, float], *, job: str
) -> Manifest:
    """Publish a finished run's model under the recipe's name, at most once per job."""
    assert recipe.publish is not None
    draft = Manifest(
        name=recipe.publish.name,
        method=recipe.method,
        paper=method.paper,
        title=recipe.title,
        licence=recipe.publish.licence,
        parents=(recipe.teacher.artifact,) if recipe.teacher and recipe.teacher.artifact else (),
        job=job,
        recipe_sha256=hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        step=recipe.steps,
        metrics=figures,
        **method.manifest_fields(),
    )
    manifest = where.store.publish(run.model, draft, key=job)
    if recipe.publish.alias:
        where.store.set_alias(manifest.name, recipe.publish.alias, manifest.version, who=job)
    return manifest


def _judge(method: Method, source: Source, config: EvaluateConfig, where: Context) -> Judge | None:
    """The recipe's judge, looked up before the training starts; None, with a warning, if it cannot read this data."""
    if config.judge is None or not isinstance(getattr(method, method.result), Denoiser):
        return None
    judge = load_judge(where.folder(config.judge))
    if source.shape is None or judge.classifier.shape == tuple(source.shape):
        return judge
    log.warning(
        "the judge reads pictures of shape %s, the data has %s: no Fréchet distance or accuracy is measured; "
        "train a classifier on this data and set evaluate.judge",
        judge.classifier.shape,
        tuple(source.shape),
    )
    return None


def _figures(method: Method, source: Source, config: EvaluateConfig, judge: Judge | None) -> dict[str, float]:
    """The method's own figures, and with a judge those of the generator and its teacher."""
    figures = dict(method.evaluate(config))
    result = getattr(method, method.result)
    if judge is None or source.shape is None or not isinstance(result, Denoiser):
        return figures
    figures |= generator_figures(result, judge, source, config)
    teacher = getattr(method, "teacher", None)
    if isinstance(teacher, Denoiser) and teacher is not result:
        many = generator_figures(teacher, judge, source, config)
        once = generator_figures(teacher, judge, source, config, sampler=one_step(teacher, result.sampler))
        figures |= {f"teacher_{name}": value for name, value in many.items()}
        figures |= {f"teacher_one_step_{name}": value for name, value in once.items()}
    return figures


def evaluate(ref: str, config: EvaluateConfig, data: dict[str, Any], where: Context) -> dict[str, float]:
    """Figures of a published generator."""
    if config.judge is None:
        raise ConfigError(
            "evaluate needs a judge: set evaluate.judge.recipe, .artifact or .path", field="judge"
        )
    model = load(ref, where)
    if not isinstance(model, Denoiser):
        raise ConfigError(f"{ref} is no generator; evaluate takes denoisers", field="artifact")
    return generator_figures(model, load_judge(where.folder(config.judge)), build_source(data), config)


def load(ref: str, where: Context, *, device: str = "cpu") -> torch.nn.Module:
    """The model of a store reference, or of a folder's path."""
    path = Path(ref)
    folder = path if path.is_dir() else where.store.fetch(ref, where.cache / "artifacts")
    return load_model(folder, device=device)


def describe_methods() -> list[dict[str, Any]]:
    """Name, family, paper, needs and recipes of every method there is."""
    by_method: dict[str, list[str]] = {}
    for name in recipe_names():
        by_method.setdefault(load_recipe(name).method, []).append(name)
    described = []
    for name in method_names():
        cls = find_method(name)
        described.append(
            {
                "name": name,
                "family": family(cls),
                "paper": cls.paper,
                "needs": needs(cls),
                "recipes": by_method.get(name, []),
            }
        )
    return described


def check(name: str, where: Context, *, listener: Listener | None = None) -> dict[str, Any]:
    """Run a recipe's claims and their ablations: `{name, passed, measured, ablation, also, seconds, ...}`.

    Raises:
        ConfigError: the recipe makes no claim.
    """
    recipe = load_recipe(name)
    if recipe.check is None:
        raise ConfigError(f"recipe {name} has no [check] table, so it claims nothing", field="check")
    claim = recipe.check
    sized = recipe.override(claim.set).model_copy(update={"publish": None})
    build(sized, where)  # a teacher that must be trained first is not this method's time
    if sized.evaluate.judge is not None:
        where.folder(sized.evaluate.judge)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="distillery-check-") as scratch:
        folders = (Path(scratch) / str(number) for number in itertools.count())

        def measure(changes: Mapping[str, Any]) -> list[dict[str, float]]:
            seeded = [sized.override(changes).model_copy(update={"seed": seed}) for seed in claim.seeds]
            return [train(run, next(folders), where, listener=listener).figures for run in seeded]

        judged = verdict(claim, measure)
    return {"name": name, **judged, "seconds": round(time.perf_counter() - began, 1)}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """The recipe's CPU threads for the duration; a teacher trained on the way must not change its student's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def user_message(error: BaseException) -> str:
    """One sentence for a person."""
    return str(error) if isinstance(error, DistilleryError) else f"{type(error).__name__}: {error}"

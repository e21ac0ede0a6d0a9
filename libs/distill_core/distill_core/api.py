"""What Distillery does, as functions: train, evaluate, publish, load, check. Services and commands call these."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.building import Context, build, for_its_teacher, load_model
from distill_core.checking import verdict
from distill_core.config import EvaluateConfig, ModelSource, Recipe, load_recipe, recipe_names
from distill_core.data import Source, build_source
from distill_core.errors import ConfigError, DistilleryError
from distill_core.evaluation import Evaluator, load_evaluator, one_step
from distill_core.method import Method
from distill_core.methods import family, find_method, method_names, needs
from distill_core.metrics.lpips import LPIPS
from distill_core.networks.adapters import ADAPTER, LoraDenoiser, combined, has_adapter, plain, read_base
from distill_core.networks.answers import parity_sample
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.weightless import real_tensors, weightless
from distill_core.parity import ParitySample
from distill_core.paths import user_path
from distill_core.pictures import save_sheet
from distill_core.radiance.renderer import load_scene
from distill_core.training.checkpoint import writing
from distill_core.training.loop import Trainer
from distill_core.training.memory import MemoryPlan, Unplannable, plan_memory, refusing_values
from distill_core.training.run import Listener, Run

__all__ = [
    "Result",
    "check",
    "context",
    "describe_methods",
    "evaluate",
    "load",
    "merge_adapters",
    "plan",
    "publish",
    "train",
    "untrained",
]
log = logging.getLogger(__name__)
MEASURED_WITH = (
    "measured_with."  # before the names of figures, among a manifest's metrics: their grounds, in words
)
_PLANNED_BY_A_STEP = ("radiance",)  # families of methods
_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)
_listener: ContextVar[Listener | None] = ContextVar(
    "who hears of models that are trained first", default=None
)


class _StoppedOnTheWay(Exception):
    """A stop was asked for while a teacher or judge was trained first; its checkpoint is written."""


@dataclass(frozen=True)
class Result:
    """What a training run left: its folder, its model's folder, its figures; `stopped` if it did not finish."""

    folder: Path
    step: int
    stopped: bool
    figures: dict[str, float] = field(default_factory=dict)
    measured_with: dict[str, str] = field(default_factory=dict)  # what the figures rest on, in words
    manifest: Manifest | None = None
    again: bool = False  # the run had been finished and published before: nothing is new
    main: bool = True  # of a run in several processes: the one that saves, measures and publishes


def context(store: ArtifactStore | str | Path, cache: Path) -> Context:
    """Where recipes find their teachers: a store, and a cache of models trained from recipes."""
    opened = store if isinstance(store, ArtifactStore) else ArtifactStore(store)

    def train_into(recipe: Recipe, folder: Path) -> Path:
        inner = recipe.model_copy(update={"publish": None, "evaluate": EvaluateConfig()})
        if train(inner, folder, here, listener=_preparing(recipe), should_stop=_should_stop.get()).stopped:
            raise _StoppedOnTheWay
        return folder / "model"

    here = Context(opened, cache, train_into)
    return here


def _preparing(recipe: Recipe) -> Listener | None:
    """A listener that hands the progress of `recipe` on as that of a model which has to be there first."""
    outer = _listener.get()
    if outer is None:
        return None

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            outer({**event, "event": "preparing", "model": recipe.title or recipe.method})
        elif event["event"] == "preparing":
            outer(dict(event))

    return tell


def untrained(where: Context, folder: Path) -> Context:
    """The same context with models made as recipes say, in `folder`, but not trained: for sizes and times."""

    def make(recipe: Recipe, target: Path) -> Path:
        with real_tensors():
            method, _ = build(recipe, here)
            method.save_result(target / "model")
        return target / "model"

    fetched = where.cache / "artifacts"
    fetched.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "artifacts").symlink_to(fetched.absolute())  # not fetched anew
    here = replace(where, cache=folder, train=make)
    return here


def plan(recipe: Recipe, where: Context) -> MemoryPlan:
    """What training `recipe` needs of memory, in seconds and without having it: no weights are read.

    Scenes, whose steps depend on the values of their tensors and which are small, are made and take one step.

    Raises:
        DistilleryError: a mistake in the recipe. Unplannable: another method whose step depends on values.
    """
    with tempfile.TemporaryDirectory(prefix="distillery-plan-") as scratch:
        try:
            with weightless():
                with refusing_values(recipe.method):
                    method, source = build(recipe, untrained(where, Path(scratch) / "weightless"))
                return plan_memory(method, source, recipe)
        except Unplannable:
            if family(find_method(recipe.method)) not in _PLANNED_BY_A_STEP:
                raise
        method, source = build(recipe, untrained(where, Path(scratch)))
        return plan_memory(method, source, recipe)


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
    try:
        with _heard(listener, should_stop), _threads(recipe.threads):
            return _train(recipe, Run(folder, listener), where, should_stop, job)
    except _StoppedOnTheWay:
        return Result(folder, 0, stopped=True)


def prepare(
    recipe: Recipe,
    where: Context,
    *,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Make what `recipe` needs first (teachers by their recipes, pairs); False if it was stopped on the way."""
    try:
        with _heard(listener, should_stop), _threads(recipe.threads):
            method, source = build(recipe, where)
            _evaluator(method, source, recipe.evaluate, where)
    except _StoppedOnTheWay:
        return False
    return True


@contextlib.contextmanager
def _heard(listener: Listener | None, should_stop: Callable[[], bool]) -> Iterator[None]:
    outer, heard = _should_stop.set(should_stop), _listener.set(listener)
    try:
        yield
    finally:
        _should_stop.reset(outer)
        _listener.reset(heard)


def _train(recipe: Recipe, run: Run, where: Context, should_stop: Callable[[], bool], job: str) -> Result:
    recipe = for_its_teacher(recipe, where)
    method, source = build(recipe, where)
    run.write_recipe(recipe)
    evaluator = _evaluator(
        method, source, recipe.evaluate, where
    )  # a mistake in it is said before the training
    trainer = Trainer(method, source, recipe, run)
    skipped = getattr(source.pixels, "skipped", 0)  # damaged pictures that the data was told to leave out
    if skipped and trainer.layout.keeps:
        run.metrics(0, {"skipped_pictures": skipped})
    outcome = trainer.train(should_stop)
    if outcome.stopped:
        return Result(run.folder, outcome.step, stopped=True)
    with trainer.averaged():
        if not trainer.layout.keeps:
            return Result(run.folder, outcome.step, False, main=False)
        key = job or _run_key(run, recipe)
        if recipe.publish and (known := where.store.published_with(recipe.publish.name, key)):
            _move_alias(known, recipe, where, key)
            return _known(run, known)
        with writing(f"the model to {run.model}", run.checkpoints):
            _save_model(method, recipe, run)
        figures = _figures(method, recipe.evaluate, evaluator)
        figures |= {"skipped_pictures": float(skipped)} if skipped else {}
        said = {} if evaluator is None else evaluator.measured_with(figures)
        told = figures | {MEASURED_WITH + name: words for name, words in said.items()}
        manifest = publish(method, recipe, run, where, told, job=key) if recipe.publish else None
    return Result(run.folder, outcome.step, False, figures=figures, measured_with=said, manifest=manifest)


def _save_model(method: Method, recipe: Recipe, run: Run) -> None:
    method.save_result(run.model)
    pictures = method.preview(recipe.seed)
    if pictures is not None:
        save_sheet(pictures, run.model / "preview.png")
    (run.model / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")


def publish(
    method: Method, recipe: Recipe, run: Run, where: Context, figures: Mapping[str, float | str], *, job: str
) -> Manifest:
    """Publish a finished run's model under the recipe's name, at most once per job."""
    assert recipe.publish is not None
    draft = Manifest(
        name=recipe.publish.name,
        method=recipe.method,
        paper=method.paper,
        title=recipe.title,
        licence=recipe.publish.licence,
        parents=_parents(method, recipe, where),
        job=job,
        recipe_sha256=hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        step=recipe.steps,
        metrics=dict(figures),
        **method.manifest_fields(),
    )
    draft = draft.model_copy(update={"parity": _parity(method, draft, run)})
    manifest = where.store.publish(run.model, draft, key=job)
    _move_alias(manifest, recipe, where, job)
    return manifest


def _parents(method: Method, recipe: Recipe, where: Context) -> tuple[str, ...]:
    """The versions in the store that it was made from, as name@version."""
    teacher = recipe.teacher.artifact if recipe.teacher else None
    student = recipe.student.artifact
    base = getattr(getattr(method, method.result), "base_ref", "")
    loaded = getattr(getattr(method, "teacher", None), "ref", ""), base
    named = [loaded[0] or teacher, loaded[1] or student]  # an alias may have moved since it was loaded
    return tuple("@".join(map(str, where.store.resolve(ref))) for ref in dict.fromkeys(named) if ref)


def _run_key(run: Run, recipe: Recipe) -> str:
    """What stands for a job where there is none: this run folder, under this recipe."""
    return f"run-{run.identity}-{hashlib.sha256(recipe.to_toml().encode()).hexdigest()[:12]}"


def _move_alias(manifest: Manifest, recipe: Recipe, where: Context, key: str) -> None:
    """Point the recipe's alias at the version, once: it may have been moved on since."""
    alias = recipe.publish.alias if recipe.publish else None
    moved = alias and any(
        (move.alias, move.who) == (alias, key) for move in where.store.history(manifest.name)
    )
    if alias and not moved:
        where.store.set_alias(manifest.name, alias, manifest.version, who=key)


def _known(run: Run, manifest: Manifest) -> Result:
    """The result of a run that was finished and published before."""
    said = {name: value for name, value in manifest.metrics.items() if name.startswith(MEASURED_WITH)}
    figures = {name: float(value) for name, value in manifest.metrics.items() if name not in said}
    words = {name.removeprefix(MEASURED_WITH): str(value) for name, value in said.items()}
    return Result(run.folder, manifest.step, False, figures, words, manifest, again=True)


def _parity(method: Method, draft: Manifest, run: Run) -> ParitySample | None:
    if draft.kind == "field":
        return parity_sample(load_scene(run.model))
    return parity_sample(getattr(method, method.result))


def _evaluator(method: Method, source: Source, config: EvaluateConfig, where: Context) -> Evaluator | None:
    """What measures the method's result; None for results that generate nothing."""
    if config.lpips is not None:
        LPIPS(user_path(config.lpips))  # the method opens it again, after the training
    result = getattr(method, method.result)
    return load_evaluator(config, result, source, where) if isinstance(result, Denoiser) else None


def _figures(method: Method, config: EvaluateConfig, evaluator: Evaluator | None) -> dict[str, float]:
    """The method's own figures, and with an evaluator those of the generator and its teacher."""
    figures = dict(method.evaluate(config))
    if evaluator is None:
        return figures
    result, teacher = getattr(method, method.result), getattr(method, "teacher", None)
    figures |= evaluator.figures(result)
    for count in result.sampler.step_counts:  # one student that serves several numbers of steps
        by_steps = evaluator.figures(result, num_steps=count)
        figures |= {f"steps_{count}_{name}": value for name, value in by_steps.items()}
    if isinstance(teacher, Denoiser) and teacher is not result:
        many = evaluator.figures(teacher)
        once = evaluator.figures(teacher, sampler=one_step(teacher, result.sampler))
        figures |= {f"teacher_{name}": value for name, value in many.items()}
        figures |= {f"teacher_one_step_{name}": value for name, value in once.items()}
    elif isinstance(result, LoraDenoiser):  # tuned without a teacher: what it was before
        with result.off():
            before = evaluator.figures(result)
        figures |= {f"start_{name}": value for name, value in before.items()}
    return figures


class Evaluation(NamedTuple):
    """Figures of a model, and in words what they rest on."""

    figures: dict[str, float]
    measured_with: dict[str, str]


def evaluate(ref: str, config: EvaluateConfig, data: dict[str, Any] | None, where: Context) -> Evaluation:
    """Figures of a published generator on `data`, or on the data that `config` names.

    Raises:
        ConfigError: no generator, nothing to measure with, or nothing to compare with.
    """
    if not config.sources:
        raise ConfigError(
            "evaluate needs something to measure with: set evaluate.judge, evaluate.extractor or evaluate.clip, "
            "each to an .artifact, .path or .recipe",
            field="evaluate",
        )
    given = data or config.data
    if given is None:
        raise ConfigError("evaluate needs data to compare with, e.g. data.name = 'digits'", field="data")
    model = load(ref, where)
    if not isinstance(model, Denoiser):
        raise ConfigError(f"{ref} is no generator; evaluate takes denoisers", field="artifact")
    evaluator = load_evaluator(config.model_copy(update={"data": None}), model, build_source(given), where)
    if evaluator is None:
        raise ConfigError(
            f"nothing can be measured: {ref} makes pictures of shape {model.image.picture}, which the judge does "
            "not read, or the data has no pictures",
            field="evaluate",
        )
    figures = evaluator.figures(model)
    return Evaluation(figures, evaluator.measured_with(figures))


def load(ref: str, where: Context, *, device: str = "cpu") -> torch.nn.Module:
    """The model of a store reference, or of a folder's path."""
    path = Path(ref)
    if not path.is_dir():
        return where.artifact(ref, device=device)
    return load_model(path, device=device, base=lambda ref: where.artifact(ref, device=device))


def merge_adapters(
    terms: Sequence[tuple[str, float]], where: Context, *, base: str | None = None
) -> LoraDenoiser:
    """The adapter `a D1 + b D2 + …` of store references or folders with their weights, sampled as the first is.

    `base` is the reference or folder of the model they adapt, for adapters that do not name it.

    Raises:
        ConfigError: a model without an adapter, adapters of different bases, or a base that nobody names.
    """
    folders = {ref: _folder(ref, where) for ref, _ in terms}
    for ref, folder in folders.items():
        if not has_adapter(folder):
            raise ConfigError(f"{ref} holds no adapter; only students of [student.lora] do", field="terms")
    meant = {ref: read_base(folder / ADAPTER) for ref, folder in folders.items()}
    if len({said.sha256 for said in meant.values() if said}) > 1:
        over = ", ".join(f"{ref} adapts {said.ref or 'another'}" for ref, said in meant.items() if said)
        raise ConfigError(f"only adapters of one model can be merged, and {over}", field="terms")
    base = base or next((said.ref for said in meant.values() if said and said.ref), None)
    if base is None:
        raise ConfigError(
            f"{terms[0][0]} does not name the model it adapts; give base, its reference or folder",
            field="base",
        )
    model = plain(load(base, where))
    if not isinstance(model, Denoiser):
        raise ConfigError(f"{base} is no denoiser; give the model that the adapters adapt", field="base")
    return combined([(LoraDenoiser.load(model, folders[ref]), weight) for ref, weight in terms])


def _folder(ref: str, where: Context) -> Path:
    return Path(ref) if Path(ref).is_dir() else where.folder(ModelSource(artifact=ref))


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
    heard = _listener.set(listener)
    try:
        build(sized, where)  # a teacher that must be trained first is not this method's time
        for source in sized.evaluate.sources.values():
            where.folder(source)
    finally:
        _listener.reset(heard)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="distillery-check-") as scratch:
        folders = (Path(scratch) / str(number) for number in itertools.count())
        said: dict[str, str] = {}

        def measure(changes: Mapping[str, Any]) -> list[dict[str, float]]:
            seeded = [sized.override(changes).model_copy(update={"seed": seed}) for seed in claim.seeds]
            results = [train(run, next(folders), where, listener=listener) for run in seeded]
            said.update(results[0].measured_with)
            return [result.figures for result in results]

        judged = verdict(claim, measure)
    seconds = round(time.perf_counter() - began, 1)
    return {"name": name, **judged, "measured_with": said, "seconds": seconds}


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

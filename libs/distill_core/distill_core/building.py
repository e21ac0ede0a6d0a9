"""From a recipe to the objects a method asks for: teacher, student, data."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import inspect
import json
import logging
import typing
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_core.artifacts import MANIFEST, ArtifactStore
from distill_core.config import ModelSource, Recipe, StudentConfig, load_recipe
from distill_core.data import Source, build_source
from distill_core.data.classes import check_same_classes, use_classes_of
from distill_core.data.pairs import build_pairs
from distill_core.data.scenes import SceneSource
from distill_core.errors import ArtifactError, ConfigError, DataError, NotFound
from distill_core.method import Method
from distill_core.methods import find_method, needs
from distill_core.networks.adapters import ADAPTER, LoraDenoiser, has_adapter, plain, read_base
from distill_core.networks.classifier import load_classifier
from distill_core.networks.clip_io import load_clip
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.weightless import real_tensors
from distill_core.paths import there, user_path
from distill_core.radiance.gaussians import load_gaussians
from distill_core.radiance.latent_scene import load_latent_scene
from distill_core.radiance.relightable import load_relightable
from distill_core.radiance.renderer import load_scene
from distill_core.suiting import suited
from distill_core.training.seeding import derive, seed_everything

log = logging.getLogger(__name__)
EXAMPLES = 10  # prompts that a text-conditional model keeps for previews


@dataclass(frozen=True)
class Context:
    """Where models come from and where trained teachers are kept."""

    store: ArtifactStore
    cache: Path
    train: Callable[[Recipe, Path], Path]  # trains a recipe in a folder, gives the model's folder

    def folder(self, source: ModelSource) -> Path:
        """The model folder that a source names; a recipe is trained once and then found again."""
        if source.path is not None:
            path = user_path(source.path)
            if not there(path) or not path.is_dir():
                raise NotFound(f"model folder {source.path} does not exist", field="path")
            return path
        if source.artifact is not None:
            return self.store.fetch(source.artifact, self.cache / "artifacts")
        if source.recipe is None:
            raise ConfigError(
                f"scene {source.scene!r} is a formula and no folder; it can only be a teacher", field="scene"
            )
        return self._trained(source.recipe)

    def load(self, source: ModelSource) -> nn.Module:
        """The model that a source names; an adapter over its base from the store."""
        if source.scene is not None:
            from distill_core.radiance.closed_form import closed_form_scene

            return closed_form_scene(source.scene)
        return load_model(self.folder(source), base=self.artifact)

    def artifact(self, ref: str, *, device: str = "cpu") -> nn.Module:
        """The model of a store reference."""
        return load_artifact(self.store, ref, self.cache / "artifacts", device=device)

    def _trained(self, name: str) -> Path:
        recipe = load_recipe(name)
        key = cache_key(recipe)
        if key in _under_way.get():
            raise ConfigError(f"recipe {name} needs itself as a teacher or judge", field="teacher.recipe")
        folder = self.cache / "models" / f"{recipe.method}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with _added(key), (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two checks that want one teacher train it once
            if not (folder / "done").exists():
                log.info("training the model of recipe %s once, into the cache", name)
                self.train(recipe, folder)
                (folder / "done").write_text(recipe.to_toml(), encoding="utf-8")
        return folder / "model"


_under_way: ContextVar[tuple[str, ...]] = ContextVar("models being trained for others", default=())


@contextlib.contextmanager
def _added(key: str) -> Iterator[None]:
    token = _under_way.set((*_under_way.get(), key))
    try:
        yield
    finally:
        _under_way.reset(token)


def cache_key(recipe: Recipe, *, above: tuple[str, ...] = ()) -> str:
    """What made a model: the resolved recipe, its method's source, torch's version, and the models it is made from."""
    made = recipe.model_copy(update={"title": "", "check": None, "publish": None}).to_toml()
    bases = [base for base in find_method(recipe.method).__mro__ if issubclass(base, Method)]
    sources = [inspect.getsource(inspect.getmodule(base)) for base in bases]  # type: ignore[arg-type]
    for source in (recipe.teacher, recipe.student.source, recipe.extractor):
        if source is not None and source.recipe is not None and source.recipe not in above:
            sources.append(cache_key(load_recipe(source.recipe), above=(*above, source.recipe)))
    return hashlib.sha256("\n".join([made, *sources, torch.__version__]).encode()).hexdigest()[:16]


Load = Callable[[str], nn.Module]  # the model of a store reference
LOADERS: dict[str, Callable[..., Any]] = {  # by what config.json says of itself
    "classifier": load_classifier,
    "clip": load_clip,
    "field": real_tensors()(load_scene),  # real in a plan too: small beside what it is trained on
    "gaussians": load_gaussians,
    "latent_field": load_latent_scene,
    "relightable": load_relightable,
}


def load_model(folder: Path, *, device: str = "cpu", base: Load | None = None) -> nn.Module:
    """Whatever a model folder holds: a denoiser (diffusers folder), a radiance field, Gaussians, a classifier, CLIP.

    An adapter without its base's weights is put over what `base` loads, on that model's device.

    Raises:
        ArtifactError: none of these, damaged, or an adapter whose base cannot be loaded.
    """
    if any((folder / slot / "config.json").is_file() for slot in ("unet", "transformer")):
        from distill_core.networks.diffusers_io import load_denoiser

        return _named(load_denoiser(folder, device=device), folder)
    if has_adapter(folder):
        return _named(_load_adapter(folder, base), folder)
    if (folder / "experts").is_dir():
        from distill_core.networks.routed import StoredExperts

        return _named(StoredExperts(folder, device=device).all_loaded(), folder)
    load = LOADERS.get(_config_kind(folder))
    if load is not None:
        return load(folder, device=device)
    raise ArtifactError(
        f"{folder} holds no model: expected a diffusers folder, or config.json with model.safetensors"
    )


def load_artifact(store: ArtifactStore, ref: str, cache: Path, *, device: str = "cpu") -> nn.Module:
    """The model of a store reference; an adapter over its base from the same store."""
    folder = store.fetch(ref, cache)
    return load_model(folder, device=device, base=lambda ref: load_artifact(store, ref, cache, device=device))


def _load_adapter(folder: Path, base: Load | None) -> LoraDenoiser:
    meant = read_base(folder / ADAPTER)
    if meant is None or not meant.ref or base is None:
        said = f"over {meant.ref}" if meant and meant.ref else "and does not say over which model"
        raise ArtifactError(
            f"{folder} holds only an adapter, {said}; load it from the store that has its base"
        )
    try:
        model = plain(base(meant.ref))
    except NotFound as error:
        raise ArtifactError(f"{folder} is an adapter over {meant.ref}, which is missing: {error}") from None
    if not isinstance(model, Denoiser):
        raise ArtifactError(
            f"{folder} is an adapter over {meant.ref}, which is no denoiser; publish it again"
        )
    return LoraDenoiser.load(model, folder)


def _named(model: Denoiser, folder: Path) -> Denoiser:
    """`model` with the name under which the store has it, if `folder` came from there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        model.ref = f"{manifest['name']}@{manifest['version']}"
    return model


def _config_kind(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("kind") or config.get("model_type") or "")  # model_type: transformers' folders
    except (OSError, ValueError, AttributeError):
        return ""


def build(recipe: Recipe, context: Context) -> tuple[Method, Source]:
    """The method with everything its constructor names, and its data source.

    Raises:
        ConfigError: the recipe lacks a table that the method needs.
    """
    recipe = for_its_teacher(recipe, context)
    cls = find_method(recipe.method)
    config = cls.Config.parse(recipe.config, where="config")
    wanted = needs(cls)
    source = _source(recipe)
    arguments: dict[str, Any] = {"data": source, "seed": recipe.seed, "network": recipe.network}
    if "network" in wanted and recipe.network is None and _is_required(cls, "network"):
        raise ConfigError(f"method {recipe.method} needs a [network] table: name and args", field="network")
    _refuse_unused(recipe, wanted)
    if source.shape is None and (purpose := cls.pictures_for(config)):
        raise ConfigError(
            f"method {recipe.method} needs real pictures for {purpose}, and data.name = "
            f"{recipe.data and recipe.data.get('name')!r} has none; choose data with pictures",
            field="data.name",
        )
    arguments["extractor"] = None
    if recipe.extractor is not None:
        arguments["extractor"] = _loaded(recipe.extractor, context, nn.Module, "extractor")
    if {"teacher", "student"} & set(wanted):
        arguments |= _models(recipe, context, cls, source)
    unknown = [name for name in wanted if name not in arguments]
    if unknown:
        raise ConfigError(f"method {recipe.method} asks for {unknown[0]!r}, which no recipe table provides")
    seed_everything(derive(recipe.seed, "init"))
    method = cls(config, **{name: arguments[name] for name in wanted})
    if "network" in wanted:  # a model made for this data is given the data's conditions
        fit(source, getattr(method, method.result))
    return method, source


def for_its_teacher(recipe: Recipe, context: Context) -> Recipe:
    """`recipe`, without what belonged to the schedule of another teacher that it was written for."""

    def former(made: Recipe) -> nn.Module:
        method, _ = build(made, context)
        return getattr(method, method.result)  # type: ignore[no-any-return]

    return suited(recipe, context, former)


def _refuse_unused(recipe: Recipe, wanted: list[str]) -> None:
    if recipe.student != StudentConfig() and "student" not in wanted:
        raise ConfigError(
            f"method {recipe.method} has no student to set up; leave [student] out", field="student"
        )
    if recipe.pairs is not None and "pairs" not in wanted:
        raise ConfigError(f"method {recipe.method} uses no pairs; leave [pairs] out", field="pairs")
    if recipe.extractor is not None and "extractor" not in wanted:
        raise ConfigError(
            f"method {recipe.method} reads no pictures; leave [extractor] out", field="extractor"
        )


def _models(recipe: Recipe, context: Context, cls: type[Method], source: Source) -> dict[str, Any]:
    """Teacher, student and pairs, as far as the constructor names them."""
    wanted, found = needs(cls), {}
    begins = recipe.student.source if "student" in wanted else None
    if "teacher" in wanted or "pairs" in wanted or begins is None:
        found["teacher"] = _teacher(recipe, context, _taught_by(cls))
        fit(source, found["teacher"])
        if recipe.student.gradient_checkpointing:  # for the fake scores that are made from it
            found["teacher"].enable_gradient_checkpointing()
    if "student" in wanted:
        base = found["teacher"] if begins is None else _loaded(begins, context, _taught_by(cls), "student")
        check_same_classes(found.get("teacher"), base)
        fit(source, base)
        seed_everything(derive(recipe.seed, "student"))  # after that: what is not cached yet is trained there
        found["student"] = _student(base, recipe.student)
        if recipe.publish is not None and isinstance(found["student"], LoraDenoiser):
            found["student"].form = recipe.publish.form
    found["pairs"] = None
    if recipe.pairs is not None:
        found["pairs"] = build_pairs(
            found["teacher"], source, recipe.pairs, _pairs_folder(recipe, context, source)
        )
    return found


def _student(base: nn.Module, wish: StudentConfig) -> nn.Module:
    """What `base` is to become before training: a copy, an adapter over it, or another network in its place."""
    if wish == StudentConfig() or not isinstance(base, Denoiser):
        return copy.deepcopy(base).requires_grad_(True)
    if wish.network is not None:
        from distill_core.networks.diffusers_new import build_like

        student: Denoiser = build_like(base, wish.network)  # type: ignore[arg-type]
    else:
        student = LoraDenoiser(base, wish.lora) if wish.lora else copy.deepcopy(base)
    if wish.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student if wish.lora else student.requires_grad_(True)


def _pairs_folder(recipe: Recipe, context: Context, source: Source) -> Path:
    """A cache folder for what made the pairs: teacher, data with its labels, and the `[pairs]` table."""
    assert recipe.pairs is not None
    assert recipe.teacher is not None
    folder = context.folder(recipe.teacher)
    files = [file for file in sorted(folder.rglob("*.safetensors")) if file.is_file()]
    marks = [
        [file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files
    ]
    table = recipe.pairs.model_dump(mode="json")
    labels = b"" if source.labels is None else source.labels.numpy().tobytes()
    given = [recipe.data, hashlib.sha256(labels).hexdigest(), table]
    made = json.dumps([str(folder), marks, *given, torch.__version__], sort_keys=True)
    return context.cache / "pairs" / hashlib.sha256(made.encode()).hexdigest()[:16]


def fit(source: Source, teacher: nn.Module) -> None:
    """Make the data give what the teacher is conditioned on, or say why it cannot.

    Raises:
        ConfigError, DataError: pictures of another shape, no or too many classes, no prompts.
    """
    if not isinstance(teacher, Denoiser) or isinstance(source, SceneSource):
        return  # of a scene's views no condition is told: a method that edits them says its own
    if source.shape is not None and tuple(source.shape) != tuple(teacher.image.picture):
        raise DataError(
            f"the data's pictures have the shape {tuple(source.shape)}, the teacher makes {teacher.image.picture}; "
            "set data.size and data.channels, or use a teacher trained on such pictures",
            field="data",
        )
    if teacher.cond.kind == "class_label":
        with real_tensors():  # labels are data, also in a plan
            use_classes_of(source, teacher.cond)
    if teacher.cond.kind == "prompt":
        if source.prompts is None:
            raise ConfigError(
                "a text-to-image teacher needs prompts: set data.name = 'prompts', or choose pictures with captions",
                field="data.name",
            )
        source.encode_with(teacher.encode_prompts)
        if not teacher.cond.examples:
            distinct = dict.fromkeys(source.prompts[:1000])
            teacher.cond = teacher.cond.model_copy(update={"examples": tuple(distinct)[:EXAMPLES]})


def _is_required(cls: type[Method], name: str) -> bool:
    return inspect.signature(cls.__init__).parameters[name].default is inspect.Parameter.empty


def _source(recipe: Recipe) -> Source:
    if recipe.data is None:
        raise ConfigError(
            f"method {recipe.method} needs a [data] table, e.g. data.name = 'digits'", field="data"
        )
    with real_tensors():  # in a plan too: only networks are without weights
        return build_source(recipe.data)


def _taught_by(cls: type[Method]) -> type[nn.Module]:
    """The kind of teacher that the constructor is annotated with."""
    hints = typing.get_type_hints(cls.__init__)
    wanted = hints.get("teacher", hints.get("student"))
    return wanted if isinstance(wanted, type) else nn.Module


def _teacher(recipe: Recipe, context: Context, kind: type[nn.Module]) -> nn.Module:
    if recipe.teacher is None:
        raise ConfigError(
            f"method {recipe.method} needs a teacher: set teacher.artifact, teacher.path or teacher.recipe",
            field="teacher",
        )
    return _loaded(recipe.teacher, context, kind, "teacher")


def _loaded(source: ModelSource, context: Context, kind: type[nn.Module], what: str) -> nn.Module:
    model = plain(context.load(source))
    if not isinstance(model, kind):
        raise ArtifactError(
            f"the {what} must be a {kind.__name__}, and this is a {type(model).__name__}; "
            "`distillery models` shows the kinds",
            field=what,
        )
    if isinstance(model, nn.Module):  # a scene is more than its field, and was loaded frozen
        model.requires_grad_(False).eval()
    return model

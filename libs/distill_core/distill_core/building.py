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

from distill_core.artifacts import ArtifactStore
from distill_core.config import ModelSource, Recipe, load_recipe
from distill_core.data import Source, build_source
from distill_core.data.conditions import Prompts
from distill_core.errors import ArtifactError, ConfigError, DataError, NotFound
from distill_core.method import Method
from distill_core.methods import find_method, needs
from distill_core.networks.denoiser import Denoiser
from distill_core.training.seeding import derive, seed_everything

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """Where models come from and where trained teachers are kept."""

    store: ArtifactStore
    cache: Path
    train: Callable[[Recipe, Path], Path]  # trains a recipe in a folder, gives the model's folder

    def folder(self, source: ModelSource) -> Path:
        """The model folder that a source names; a recipe is trained once and then found again."""
        if source.path is not None:
            path = Path(source.path).expanduser()
            if not path.is_dir():
                raise NotFound(f"model folder {source.path} does not exist", field="path")
            return path
        if source.artifact is not None:
            return self.store.fetch(source.artifact, self.cache / "artifacts")
        return self._trained(str(source.recipe))

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


def cache_key(recipe: Recipe) -> str:
    """What made a model: the resolved recipe, the method's source and torch's version."""
    source = inspect.getsource(inspect.getmodule(find_method(recipe.method)))  # type: ignore[arg-type]
    made = recipe.model_copy(update={"title": "", "check": None, "publish": None}).to_toml()
    return hashlib.sha256("\n".join([made, source, torch.__version__]).encode()).hexdigest()[:16]


def load_model(folder: Path, *, device: str = "cpu") -> nn.Module:
    """Whatever a model folder holds: a denoiser (diffusers folder), a radiance field, a classifier.

    Raises:
        ArtifactError: none of these, or damaged.
    """
    if any((folder / slot / "config.json").is_file() for slot in ("unet", "transformer")):
        from distill_core.networks.diffusers_io import load_denoiser

        return load_denoiser(folder, device=device)
    kind = _config_kind(folder)
    if kind == "classifier":
        from distill_core.networks.classifier import load_classifier

        return load_classifier(folder).to(device)
    if kind == "field":
        from distill_core.radiance.renderer import load_scene

        return load_scene(folder)
    raise ArtifactError(
        f"{folder} holds no model: expected a diffusers folder, or config.json with model.safetensors"
    )


def _config_kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("kind", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def build(recipe: Recipe, context: Context) -> tuple[Method, Source]:
    """The method with everything its constructor names, and its data source.

    Raises:
        ConfigError: the recipe lacks a table that the method needs.
    """
    cls = find_method(recipe.method)
    config = cls.Config.parse(recipe.config, where="config")
    wanted = needs(cls)
    source = _source(recipe)
    arguments: dict[str, Any] = {"data": source, "seed": recipe.seed, "network": recipe.network}
    if "network" in wanted and recipe.network is None and _is_required(cls, "network"):
        raise ConfigError(f"method {recipe.method} needs a [network] table: name and args", field="network")
    if {"teacher", "student"} & set(wanted):
        arguments["teacher"] = _teacher(recipe, context, _taught_by(cls))
        fit(source, arguments["teacher"])
        arguments["student"] = copy.deepcopy(arguments["teacher"]).requires_grad_(True)
    unknown = [name for name in wanted if name not in arguments]
    if unknown:
        raise ConfigError(f"method {recipe.method} asks for {unknown[0]!r}, which no recipe table provides")
    seed_everything(derive(recipe.seed, "init"))
    method = cls(config, **{name: arguments[name] for name in wanted})
    return method, source


def fit(source: Source, teacher: nn.Module) -> None:
    """Make the data give what the teacher is conditioned on, or say why it cannot.

    Raises:
        ConfigError, DataError: pictures of another shape, no or too many classes, no prompts.
    """
    if not isinstance(teacher, Denoiser):
        return
    if source.shape is not None and tuple(source.shape) != tuple(teacher.image.picture):
        raise DataError(
            f"the data's pictures have the shape {tuple(source.shape)}, the teacher makes {teacher.image.picture}; "
            "set data.size and data.channels, or use a teacher trained on such pictures",
            field="data",
        )
    wanted, classes = teacher.cond.kind, source.num_classes
    if wanted == "class_label" and (classes is None or classes > (teacher.cond.num_classes or 0)):
        raise ConfigError(
            f"the teacher knows {teacher.cond.num_classes} classes, the data has {classes or 'no labels'}; "
            "choose data whose labels the teacher was trained on",
            field="data",
        )
    if wanted == "prompt":
        if not isinstance(source, Prompts):
            raise ConfigError(
                "a text-to-image teacher needs prompts: set data.name = 'prompts'", field="data.name"
            )
        source.encode_with(lambda prompts: teacher.encode_prompts(prompts))


def _is_required(cls: type[Method], name: str) -> bool:
    return inspect.signature(cls.__init__).parameters[name].default is inspect.Parameter.empty


def _source(recipe: Recipe) -> Source:
    if recipe.data is None:
        raise ConfigError(
            f"method {recipe.method} needs a [data] table, e.g. data.name = 'digits'", field="data"
        )
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
    teacher = load_model(context.folder(recipe.teacher))
    if not isinstance(teacher, kind):
        raise ArtifactError(
            f"method {recipe.method} learns from a {kind.__name__}, and this teacher is a "
            f"{type(teacher).__name__}; `distillery models` shows the kinds",
            field="teacher",
        )
    return teacher.requires_grad_(False).eval()

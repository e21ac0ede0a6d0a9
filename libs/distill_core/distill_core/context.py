"""Where a recipe's models come from: the store, folders, and models that other recipes train once, into a cache."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core.artifacts import ArtifactStore
from distill_core.cache_keys import cache_key, pairs_key
from distill_core.errors import ConfigError, NotFound
from distill_core.files.paths import there, user_path
from distill_core.kinds.loading import adapted, load_model
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.tables import ModelSource, TeacherSource

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

    def load(self, source: ModelSource) -> Any:
        """The model that a source names; an adapter over its base from the store.

        Raises:
            ConfigError: adapters that cannot be added to it.
        """
        if source.scene is not None:
            from distill_core.radiance.analytic.closed_form import closed_form_scene

            return closed_form_scene(source.scene)
        model = load_model(self.folder(source), models=self)
        adapters = source.adapters if isinstance(source, TeacherSource) else None
        return adapted(model, adapters, self) if adapters else model

    def artifact(self, ref: str, *, device: str = "cpu") -> Any:
        """The model of a store reference."""
        return load_model(self.store.fetch(ref, self.cache / "artifacts"), device=device, models=self)

    def pairs(self, recipe: Recipe) -> Path:
        """The folder of the pairs that a recipe's teacher makes."""
        return self.cache / "pairs" / pairs_key(recipe, self.store)

    def _trained(self, name: str) -> Path:
        recipe = load_recipe(name)
        key = cache_key(recipe, self.store)
        if key in _under_way.get():
            raise ConfigError(
                f"recipe {name} needs itself as a teacher, judge or data set", field="teacher.recipe"
            )
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

"""Keys of what is made once and found again: models and data sets of recipes, pairs of noise and picture.

A key is a digest of whatever decides the result: the tables of the recipe, in which each reference counts as what it
stands for now (a path as the files below it, an alias as its version, a recipe as its own key), the modules that
compute it, and torch's version. It holds no path, so that equal things have one key in every checkout and process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from distill_core.artifacts import ArtifactStore
from distill_core.errors import DistilleryError
from distill_core.files.paths import files_below, there, user_path
from distill_core.method import Method
from distill_core.methods import find_method
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.references import Named, references

CORE = Path(__file__).parent
# What decides no bit of a model: words, how it is measured and published, how often a run is looked at.
DECIDE_NOTHING = frozenset(
    {"title", "check", "publish", "evaluate", "log_every", "sample_every", "checkpoint_every"}
    | {"keep_checkpoints", "prefetch"}
)
# Packages whose modules compute something; the others read recipes, keep files and say what is wrong.
COMPUTING = ("data", "diffusion", "losses", "methods", "metrics", "networks", "radiance", "reductions")


def cache_key(recipe: Recipe, store: ArtifactStore, *, above: tuple[str, ...] = ()) -> str:
    """The key of what a recipe trains; `above` are the recipes that name it, so that a circle ends.

    Raises:
        DistilleryError: a table that its schema refuses, or an artifact that is not in the store.
    """
    if recipe.replaced is not None:  # what was set of these tables decides nothing either
        given = [key for key in recipe.replaced.given if key.partition(".")[0] not in DECIDE_NOTHING]
        replaced = recipe.replaced.model_copy(update={"given": tuple(given)})
        recipe = recipe.model_copy(update={"replaced": replaced})
    own = [base.__module__ for base in find_method(recipe.method).__mro__ if issubclass(base, Method)]
    return _key(recipe, Recipe.model_fields.keys() - DECIDE_NOTHING, own, store, above)


def pairs_key(recipe: Recipe, store: ArtifactStore) -> str:
    """The key of a recipe's pairs: they follow from teacher, data and `[pairs]` alone."""
    return _key(recipe, {"teacher", "data", "pairs"}, ["distill_core.data.pairs"], store, ())


def _key(
    recipe: Recipe, tables: Collection[str], code: list[str], store: ArtifactStore, above: tuple[str, ...]
) -> str:
    named = list(references(recipe, tables))
    code += [one.value for one in named if one.what == "code"]
    found = [(one, _meaning(one, store, above)) for one in named if one.what != "code"]
    meanings = {one.value: meaning for one, meaning in found}
    values = recipe.model_dump(mode="json", include=set(tables), exclude_none=True)
    made = [
        _replaced(values, meanings),
        sorted((one.key, meaning) for one, meaning in found),
        modules_digest(code),
        torch.__version__,
    ]
    return _digest(made)[:16]


def _meaning(named: Named, store: ArtifactStore, above: tuple[str, ...]) -> str:
    """What a reference stands for now; itself where it leads nowhere, which is said when it is followed."""
    if named.what == "artifact":
        manifest = store.manifest(named.value)
        return f"{manifest.ref}:{_digest(sorted((n, f.sha256) for n, f in manifest.files.items()))}"
    if named.what == "path":
        return files_digest(user_path(named.value)) or named.value
    if named.value in above:
        return named.value
    try:
        return cache_key(load_recipe(named.value), store, above=(*above, named.value))
    except DistilleryError:
        return named.value


def _replaced(value: Any, meanings: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(entry, meanings) for key, entry in value.items()}
    if isinstance(value, list):
        return [_replaced(entry, meanings) for entry in value]
    return meanings.get(value, value) if isinstance(value, str) else value


def files_digest(path: Path) -> str:
    """A digest of names, sizes and times of the files at or below `path`, hidden ones apart; "" where nothing is."""
    if not there(path):
        return ""
    return _digest([_mark(file, name) for name, file in files_below(path)])


def _mark(file: Path, name: str) -> tuple[str, int, int]:
    try:
        found = file.stat()
    except OSError:  # a link that leads nowhere
        return name, -1, -1
    return name, found.st_size, found.st_mtime_ns


def modules_digest(roots: Collection[str]) -> str:
    """A digest of these modules, and of the computing ones that they import, directly or through others.

    Of packages other than ours, those modules count that belong to the package of a root.
    """
    packages = {name.partition(".")[0] for name in roots}
    found: dict[str, str] = {}
    left = sorted(set(roots))
    while left:
        module = left.pop()
        file = _file_of(module)
        if module in found or file is None:
            continue
        state = file.stat()
        found[module], imported = _read_module(file, state.st_mtime_ns, state.st_size)
        left += [name for name in imported if name.partition(".")[0] in packages and _computes(name)]
    return _digest(sorted(found.items()))


def _computes(module: str) -> bool:
    top, _, rest = module.partition(".")
    return top != CORE.name or rest.partition(".")[0] in COMPUTING


@functools.lru_cache(maxsize=1024)
def _read_module(file: Path, time_ns: int, size: int) -> tuple[str, tuple[str, ...]]:
    """The digest of a module's source, and the names that it imports; the last two arguments date the entry."""
    source = file.read_bytes()
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return hashlib.sha256(source).hexdigest(), tuple(sorted(imported))


def _file_of(module: str) -> Path | None:
    """The source of a module; None for what is none, such as a function that is imported by name."""
    top, *parts = module.split(".")
    package = CORE if top == CORE.name else _root_of(top)
    if package is None:
        return None
    if package.is_file():
        return package if not parts else None
    path = package.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _root_of(top: str) -> Path | None:
    """The folder of a package of others that is loaded, or the file of a module that is no package."""
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return None
    return Path(file).parent if Path(file).name == "__init__.py" else Path(file)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

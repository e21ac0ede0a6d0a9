"""Keys of runs in the store: a job's, or without a queue that of the folder and its recipe."""

from __future__ import annotations

import hashlib

from distill_core.artifacts import Manifest
from distill_core.context import Context
from distill_core.method import Method
from distill_core.recipe import Recipe
from distill_core.recipe.references import references
from distill_core.training.run_folder import Run

# before the names of figures, among a manifest's metrics: their grounds, in words
MEASURED_WITH = "measured_with."


def run_key(run: Run, recipe: Recipe) -> str:
    """The key of a run without a job: of this run folder, under this recipe."""
    return f"run-{run.identity}-{hashlib.sha256(recipe.to_toml().encode()).hexdigest()[:12]}"


def parents(method: Method, recipe: Recipe, context: Context) -> tuple[str, ...]:
    """The versions in the store that a result was made from, as name@version."""
    teacher = recipe.teacher.artifact if recipe.teacher else None
    student = recipe.student.artifact
    base = getattr(getattr(method, method.result), "base_ref", "")
    loaded = getattr(getattr(method, "teacher", None), "ref", ""), base
    named = [loaded[0] or teacher, loaded[1] or student]  # an alias may have moved since it was loaded
    named += [source.artifact for source in recipe.teachers.values()]
    sources = [recipe.teacher, *recipe.teachers.values()]
    named += [term.ref for source in sources if source for term in source.adapters or ()]
    named += [one.value for one in references(recipe, {"data"}) if one.what == "artifact"]
    resolved = ("@".join(map(str, context.store.resolve(ref))) for ref in dict.fromkeys(named) if ref)
    return tuple(dict.fromkeys(resolved))


def move_alias(manifest: Manifest, recipe: Recipe, context: Context, key: str) -> None:
    """Point the recipe's alias at the version, once: it may have been moved on since."""
    alias = recipe.publish.alias if recipe.publish else None
    moved = alias and any(
        (move.alias, move.who) == (alias, key) for move in context.store.history(manifest.name)
    )
    if alias and not moved:
        context.store.set_alias(manifest.name, alias, manifest.version, who=key)

"""Publishing: a finished run's models with what their kinds say of them, at most once per job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from distill_core.artifacts import Manifest
from distill_core.building import names_of_results
from distill_core.context import Context
from distill_core.data import Source
from distill_core.kinds import find_kind
from distill_core.kinds.base import image_probe_of
from distill_core.kinds.cards import described
from distill_core.method import Method, Model
from distill_core.pictures import save_sheet
from distill_core.probe import write_probe
from distill_core.recipe import Recipe
from distill_core.running.keys import move_alias, parents
from distill_core.training.run_folder import Run


def save_models(method: Method, source: Source, recipe: Recipe, run: Run) -> None:
    """Write the folder of each model that the method publishes: weights, preview, probe, recipe."""
    for folder, model in _folders(method, run).items():
        kind = find_kind(model.kind)
        model.save(folder)
        pictures = kind.preview(model, source, recipe.seed, method.references())
        if pictures is not None:
            save_sheet(pictures, folder / "preview.png")
        write_probe(folder, kind.probe(model))
        (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")


def publish(
    method: Method,
    recipe: Recipe,
    run: Run,
    context: Context,
    figures: Mapping[str, float | str],
    *,
    job: str,
) -> Manifest:
    """Publish the run's models, the main one under the recipe's name, others as NAME-ROLE; the main one's manifest.

    The main one comes last: a run whose main model is published is finished, and is not published again. `figures`
    are those of the main one.
    """
    assert recipe.publish is not None
    names = names_of_results(method, recipe.publish.name)
    results = list(zip(names.values(), _folders(method, run).items(), strict=True))
    for name, (folder, model) in reversed(results):
        main = folder == run.model
        draft = Manifest(
            name=name,
            method=recipe.method,
            paper=method.paper,
            title=recipe.title,
            licence=recipe.publish.licence,
            parents=parents(method, recipe, context),
            job=job,
            recipe_sha256=hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
            step=recipe.steps,
            metrics=dict(figures) if main else {},
            parity=image_probe_of(find_kind(model.kind).as_saved(model, folder)),
            **described(model),
        )
        published = context.store.publish(folder, draft, key=job)
    move_alias(published, recipe, context, job)
    return published


def _folders(method: Method, run: Run) -> dict[Path, Model]:
    """The folder of each published model: `model/` for the main one, `model-ROLE/` for others."""
    models = method.published()
    main = next(iter(models))
    return {
        run.model if role == main else run.folder / f"model-{role}": model for role, model in models.items()
    }

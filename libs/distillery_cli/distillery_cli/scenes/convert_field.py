"""`distillery convert-field`: a scene's field as a field of another kind. It is `train pvd` with the keys filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from distill_core.config import NAME_PATTERN
from distill_core.errors import ConfigError, nearest
from distill_core.recipe import load_recipe, parse_overrides, recipe_names
from distillery_cli.terminal.output import AsJson, Overrides, StoreUrl
from distillery_cli.training import train

RECIPE = "pvd"
CLOSED_FORM = ("procedural", "alcove")
STEPS = {"hash": 400, "vm": 400, "cp": 600, "tensors": 1000, "sparse": 1000, "mlp": 4000}
ARGUMENTS: dict[str, dict[str, int]] = {
    "hash": {"levels": 8, "min_resolution": 12, "max_resolution": 192},
    "vm": {"resolution": 128},
    "cp": {"resolution": 128, "density_rank": 48, "color_rank": 96},
    "tensors": {"resolution": 96},
    "sparse": {"resolution": 96},
}
LEARNING_RATES = {"hash": 2e-2, "vm": 2e-2, "cp": 2e-2, "tensors": 0.1, "sparse": 0.1, "mlp": 3e-3}
FEATURE_SHARE, POINTS_SHARE = 0.15, 0.4  # of the steps: when colours join, and when pixels do


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        name="convert-field",
        epilog="Examples: distillery convert-field lego@3 vm  ·  "
        "distillery convert-field out/run/model tensors -s steps=1200 --publish lego-tensors",
    )(convert_field)


def convert_field(
    scene: Annotated[
        str, typer.Argument(help="name@version, a model folder, a recipe, or procedural or alcove.")
    ],
    kind: Annotated[str, typer.Argument(help="hash, mlp, vm, cp, tensors or sparse.")],
    overrides: Overrides = None,
    publish: Annotated[str | None, typer.Option("--publish", metavar="NAME", help="Publish it so.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; one that exists is resumed.")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> int:
    """Distil the field of SCENE into one of KIND, without images (PVD). Published as SCENE-KIND by default."""
    if kind not in STEPS:
        raise ConfigError(
            f"no field that can be trained is called {kind!r}{nearest(kind, STEPS)}; "
            f"choose from {', '.join(STEPS)}",
            field="kind",
        )
    steps = parse_overrides(overrides or []).get("steps")
    known = steps if isinstance(steps, int) else STEPS[kind]  # what else it is, the recipe refuses
    filled = settings(scene, kind, steps=known, publish=publish)
    return train.train(RECIPE, [*filled, *(overrides or [])], out, store=store, as_json=as_json)


def settings(scene: str, kind: str, *, steps: int, publish: str | None = None) -> list[str]:
    """The recipe's keys, KEY=VALUE, that make `pvd` convert `scene` into a field of `kind`."""
    values = {
        "data": {"name": "nothing"},
        f"teacher.{_source_of(scene)}": scene,
        "network": {"name": kind, "args": ARGUMENTS.get(kind, {})},
        "optim.student.lr": LEARNING_RATES[kind],
        "steps": steps,
        "config.feature_until": round(FEATURE_SHARE * steps),
        "config.points_until": round(POINTS_SHARE * steps),
        "title": f"{kind} field of {scene}",
        "publish.name": publish or _published_as(scene, kind),
    }
    return [f"{key}={_toml(value)}" for key, value in values.items()]


def _source_of(scene: str) -> str:
    if Path(scene).is_dir():
        return "path"
    if scene in CLOSED_FORM:
        return "scene"
    return "recipe" if scene in recipe_names() else "artifact"


def _published_as(scene: str, kind: str) -> str:
    """A plain name made of the scene's and the kind."""
    if Path(scene).is_dir():
        folder = Path(scene).resolve()
        base = folder.parent.name if folder.name == "model" else folder.name
    else:
        base = scene.partition("@")[0]
        if scene in recipe_names() and (named := load_recipe(scene).publish):
            base = named.name
    plain = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._") or "scene"
    name = f"{plain[:48]}-{kind}"
    assert re.fullmatch(NAME_PATTERN, name)
    return name


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)

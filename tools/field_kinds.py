"""`field-kinds`: a captured scene as a field of every kind; a table and pictures for docs/evidence.md."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError
from distill_core.recipe import load_recipe, parse_overrides
from distillery_cli.scenes.convert_field import STEPS, settings
from distillery_cli.terminal.output import (
    AsJson,
    Overrides,
    bar,
    emit_json,
    figure,
    markdown_table,
    results,
    table,
)

if TYPE_CHECKING:
    from distill_core.data.posed import SceneSource
    from distill_core.radiance.cameras.camera import Camera
    from distill_core.radiance.scenes.scene import Scene
    from distill_core.recipe import Recipe

FROM_IMAGES, CONVERSION = "nerf_blender", "pvd"
KEPT, IMAGES = Path("docs/scenes.json"), Path("docs/images")
COLUMNS = ("field", "made from", "parameters", "seconds", "PSNR dB", "lost dB", "ms a frame")
VIEW = 0  # the test view that is shown


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Example: python -m tools field-kinds scenes/lego --factor 2")(field_kinds)


def field_kinds(
    scene: Annotated[
        Path, typer.Argument(help="A folder with transforms_train.json and transforms_test.json.")
    ],
    factor: Annotated[int, typer.Option(min=1, help="Pictures are averaged over factor x factor.")] = 1,
    kinds: Annotated[str, typer.Option(help="Fields to convert to.")] = "mlp,vm,cp,tensors,sparse",
    overrides: Overrides = None,
    repository: Annotated[Path, typer.Option(help="The checkout whose documents are written.")] = Path(),
    as_json: AsJson = False,
) -> int:
    """Train a hash-grid field of SCENE, convert it to other kinds without images, and keep table and pictures.

    The documents themselves are written by `python -m tools claims --no-run`.
    """
    chosen = [kind.strip() for kind in kinds.split(",")]
    if unknown := set(chosen) - STEPS.keys():
        raise ConfigError(
            f"no field is called {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}", field="kinds"
        )
    data = {"name": "blender", "path": str(scene.absolute()), "factor": factor}
    with tempfile.TemporaryDirectory(prefix="distillery-conversions-") as scratch:
        changes = parse_overrides(overrides or [])
        rows, pictures, size = measured(data, chosen, Path(scratch), changes)
    name = scene.resolve().name
    picture = IMAGES / f"{name}.png"
    (repository / IMAGES).mkdir(parents=True, exist_ok=True)
    _save_strip(pictures, repository / picture)
    known = kept_scenes(repository)
    shown = ["the photograph", *(row["field"] for row in rows)]
    known[name] = {"size": size, "picture": picture.name, "shown": shown, "rows": rows}
    (repository / KEPT).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if as_json:
        emit_json(known[name])
    else:
        results.print(table(list(COLUMNS), [_cells(row) for row in rows], title=name))
    return 0


def measured(
    data: Mapping[str, Any], kinds: Sequence[str], scratch: Path, changes: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Any], int]:
    """A row for each field, pictures of one test view (the photograph first), and their width in pixels."""
    from distill_core.data import build_source
    from distill_core.data.posed import SceneSource

    source = build_source(dict(data))
    assert isinstance(source, SceneSource)
    camera = source.test.camera(VIEW)
    rows: list[dict[str, Any]] = []
    pictures = [_photograph(source)]
    for kind in ("hash", *kinds):
        if not rows:
            recipe = load_recipe(FROM_IMAGES, {"data": dict(data), **changes})
        else:
            keys = parse_overrides(settings(str(scratch / "hash" / "model"), kind, steps=STEPS[kind]))
            recipe = load_recipe(CONVERSION, {**keys, "data": dict(data), **changes})
        row, picture = _trained(kind, recipe, camera, scratch / str(len(rows)) if rows else scratch / "hash")
        rows.append({"field": kind, "made_from": "the hash field" if rows else "images", **row})
        pictures.append(picture)
    return rows, pictures, camera.width


def _trained(kind: str, recipe: Recipe, camera: Camera, folder: Path) -> tuple[dict[str, Any], Any]:
    """Figures of a field that `recipe` trains, and its picture."""
    from distill_core import api
    from distillery_cli.training.train import local_context

    began = time.perf_counter()
    with bar(kind) as line:
        unpublished = recipe.model_copy(update={"publish": None})
        figures = api.train(unpublished, folder, local_context(), listener=line.tell).figures
    spent = round(time.perf_counter() - began, 1)
    seen, picture = _looked_at(folder / "model", camera)
    return {"seconds": spent, "psnr": figures["psnr"], "lost": figures.get("psnr_lost", 0.0), **seen}, picture


def _photograph(source: SceneSource) -> Any:
    import torch

    from distill_core.radiance.rendering.quadrature import over

    rgba = source.test.images[VIEW]
    return over(rgba[..., :3], rgba[..., 3:], torch.tensor(source.spec.background)).numpy()


def _looked_at(folder: Path, camera: Camera) -> tuple[dict[str, float], Any]:
    """Size and speed of a saved field, and its picture."""
    from distill_core.radiance.scenes.scene import load_scene, render

    scene: Scene = load_scene(folder)
    render(scene, camera)  # the first frame pays for what is made once
    began = time.perf_counter()
    picture = render(scene, camera).rgb.numpy()
    spent = time.perf_counter() - began
    parameters = sum(parameter.numel() for parameter in scene.field.parameters())
    return {"parameters": parameters, "ms_per_frame": 1000 * spent}, picture


def _save_strip(pictures: Sequence[Any], path: Path) -> None:
    import numpy as np
    from PIL import Image

    strip = np.concatenate([np.round(255 * np.clip(picture, 0, 1)) for picture in pictures], axis=1)
    large = Image.fromarray(strip.astype(np.uint8))
    large.resize((2 * large.width, 2 * large.height), Image.Resampling.NEAREST).save(path)


def kept_scenes(repository: Path) -> dict[str, Any]:
    """Figures that `python -m tools field-kinds` measured before."""
    path = repository / KEPT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def section(repository: Path) -> str:
    """The part of docs/evidence.md on captured scenes; empty where none was measured."""
    parts = []
    for name, scene in kept_scenes(repository).items():
        rows = [_cells(row) for row in scene["rows"]]
        shown = ", ".join(scene["shown"])
        parts += [
            f"\n## {name}, {scene['size']} pixels wide: one field converted into the others, without images\n",
            "Mean PSNR over the test views; `lost` is what the hash field has more. Seconds are of one thread, with\n"
            f"evaluation, on a shared machine. Written by `python -m tools field-kinds {name}`. Pictures: {shown}.\n",
            markdown_table(COLUMNS, rows),
            f"![{shown}](images/{scene['picture']})\n",
        ]
    return "\n".join(parts)


def _cells(row: Mapping[str, Any]) -> list[str]:
    lost = "" if row["made_from"] == "images" else figure(row["lost"])
    size = f"{row['parameters'] / 1e6:.3g} M"
    return [
        row["field"],
        row["made_from"],
        size,
        figure(row["seconds"]),
        figure(row["psnr"]),
        lost,
        figure(row["ms_per_frame"]),
    ]

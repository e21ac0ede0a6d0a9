"""What converting a radiance field costs beside training one from images: dB against seconds of training.

PVD's claim is about time (arXiv 2211.15977: an MLP distilled from a hash grid is ready 10 to 20 times sooner than one
trained from images as published, i.e. with samples all along the rays). An MLP that learns from images with our
occupancy grid, which skips what is empty, is shown beside it. All times are CPU seconds of training steps on one
thread; looking at the pictures in between is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from distill_core.context import Context
    from distill_core.recipe import Recipe
    from distill_core.training.loop import Trainer

TEACHER, FROM_IMAGES, CONVERTED = "nerf_procedural", "nerf_procedural_mlp", "pvd"
BLENDER = "nerf_blender"  # the teacher's recipe where a scene is given
NEVER = 1_000_000  # steps between two looks at the occupancy grid
POINTS = 12  # of a curve
PROBE = 40  # steps from which the time of a step is known
TEACHER_TIMES = 4  # the steps of its recipe: a student is no better than its teacher
SHARE = 10  # the conversion's time is this part of the training's
STAGES = {"config.feature_until": 0.15, "config.points_until": 0.4}  # as shares of the run
PIXELS_ONLY = {
    "config.feature_until": 0.0,
    "config.points_until": 0.0,
    "config.weights": {
        "feature": 0.0,
        "feature_decay": 1.0,
        "density": 0.0,
        "color": 0.0,
        "pixel": 10.0,
        "late": 1.0,
    },
}
MLP = {"optim.student.lr": 6e-3, "batch_size": 256, "config.max_samples": 1536}  # many small steps
MLP_STAGES = {"config.feature_until": 0.05, "config.points_until": 0.3}
VM_SECONDS = 6.0
FASTER, GAIN_DB = 10.0, 3.0  # what is wanted
CONVERSION_COLUMNS = ["field", "seconds", "PSNR dB", ""]
PLOT = Path("images/conversion.png")  # beside the page
TITLES = {
    "mlp_from_images": "MLP from images, samples all along the rays",
    "mlp_with_grid": "MLP from images, with our occupancy grid",
    "hash_teacher": "hash grid from images, the teacher",
    "mlp_converted": "MLP from the teacher (PVD)",
}
Curve = list[tuple[float, float]]  # seconds, dB
Tell = Callable[[str], object]


class Comparison(NamedTuple):
    """Scene that a conversion is compared on: a Blender scene's folder, or the procedural scene."""

    seconds: float = 480.0  # of the MLPs from images, about
    scene: Path | None = None
    factor: int = 1  # the scene's pictures are averaged over factor x factor


def measure_conversion(work: Path, comparison: Comparison, tell: Tell) -> dict[str, Any]:
    """An MLP from images in two ways, the hash teacher, and the same MLP from that in a tenth of the time."""
    import torch

    from distill_core import api
    from distill_core.recipe import load_recipe

    torch.set_num_threads(1)
    context = api.context(work / "store", work / "cache")
    images = load_recipe(FROM_IMAGES)
    assert images.network is not None
    mlp = {"network": images.network.model_dump(mode="json")}
    teacher, data = load_recipe(TEACHER), {}
    seconds, scene, factor = comparison
    if scene is not None:
        data = {"data": {"name": "blender", "path": str(scene.absolute()), "factor": factor}}
        teacher = load_recipe(BLENDER, data)
        images = teacher.override({**mlp, "optim.field": images.optim["field"].model_dump(mode="json")})
    pvd = load_recipe(CONVERTED, {"teacher": {"path": str(work / "teacher" / "model")}, **data, **mlp, **MLP})
    everywhere = images.override({"config.grid_every": NEVER})
    longer = teacher.override({"steps": TEACHER_TIMES * teacher.steps})
    curves = {
        "mlp_from_images": _curve("MLP from images", everywhere, seconds, context, work / "images", tell),
        "mlp_with_grid": _curve("MLP from images with grid", images, seconds, context, work / "grid", tell),
        "hash_teacher": _curve("hash teacher from images", longer, None, context, work / "teacher", tell),
    }
    spent = curves["mlp_from_images"][-1][0] / SHARE
    title = "MLP from the teacher"
    curves["mlp_converted"] = _curve(title, pvd, spent, context, work / "mlp", tell, MLP_STAGES)
    name = "procedural" if scene is None else scene.resolve().name
    return {"scene": name, "curves": curves, **conclusions(curves)}


def measure_stages(work: Path, tell: Tell) -> dict[str, Any]:
    """A VM field of the hash teacher by PVD's stages, and by pixels alone: dB to the teacher at equal time."""
    import torch

    from distill_core import api
    from distill_core.recipe import load_recipe

    torch.set_num_threads(1)
    context = api.context(work / "store", work / "cache")
    pvd = load_recipe(CONVERTED)
    ways = {
        "staged": {},
        "pixels": PIXELS_ONLY,
        "pixels_own_colors": {**PIXELS_ONLY, "config.transfer": False},
    }
    return {
        name: _curve(f"VM, {name}", pvd, VM_SECONDS, context, work / name, tell, changes, "psnr_to_teacher")[
            -1
        ]
        for name, changes in ways.items()
    }


def conclusions(curves: dict[str, Curve]) -> dict[str, float | None]:
    """When the converted MLP is as good as those from images, and when that with a grid was as good as it."""
    seconds, target_psnr = curves["mlp_from_images"][-1]
    spent, psnr = curves["mlp_converted"][-1]
    reached = _first(curves["mlp_converted"], target_psnr)
    return {
        "from_images_seconds": seconds,
        "from_images_psnr": target_psnr,
        "converted_seconds": reached,  # None: not within a tenth of the time
        "converted_psnr": psnr,
        "times_faster": None if reached is None else seconds / reached,
        "teacher_seconds": curves["hash_teacher"][-1][0],
        "with_grid_seconds_to_converted_psnr": _first(curves["mlp_with_grid"], psnr),
        "converted_total_seconds": spent,
    }


def _first(curve: Curve, wanted: float) -> float | None:
    """Seconds after which a curve is at `wanted` dB; None if it never is."""
    return next((at for at, psnr in curve if psnr >= wanted), None)


def _curve(
    title: str,
    recipe: Recipe,
    seconds: float | None,
    context: Context,
    folder: Path,
    tell: Tell,
    stages: dict[str, Any] | None = None,
    metric: str = "psnr",
) -> Curve:
    """Train as `recipe` says, for as many steps as fit `seconds` (None: its own number); the model is saved."""
    steps = (
        recipe.steps
        if seconds is None
        else max(PROBE, round(seconds / _step_seconds(recipe, context, folder)))
    )
    changes: dict[str, Any] = {"steps": steps}
    for key, share in {**(STAGES if recipe.method == CONVERTED else {}), **(stages or {})}.items():
        changes[key] = round(share * steps) if key in STAGES else share
    recipe = recipe.override(changes)
    trainer = _trainer(recipe, context, folder)
    from distill_core.kinds.field.card import Evaluate

    points: Curve = []
    spent, every = 0.0, max(1, steps // POINTS)
    while trainer.step < steps:
        began = time.process_time()
        trainer.train_step()
        trainer.step += 1
        spent += time.process_time() - began
        if trainer.step % every == 0 or trainer.step == steps:
            psnr = trainer.method.figures(Evaluate.parse(recipe.evaluate))[metric]
            points.append((round(spent, 3), round(psnr, 3)))
            tell(f"{title}: {trainer.step}/{steps} steps, {spent:.0f} s, {psnr:.2f} dB")
    trainer.method.main.save(folder / "model")
    return points


def _step_seconds(recipe: Recipe, context: Context, folder: Path) -> float:
    """The middle one of the last half of a few steps; of a conversion, those of its last stage, which cost the most."""
    if recipe.method == CONVERTED:
        recipe = recipe.override({"config.feature_until": 0, "config.points_until": 0})
    trainer = _trainer(recipe, context, folder / "probe")
    times = []
    for _ in range(PROBE):
        began = time.process_time()
        trainer.train_step()
        trainer.step += 1
        times.append(time.process_time() - began)
    return sorted(times[PROBE // 2 :])[PROBE // 4]


def _trainer(recipe: Recipe, context: Context, folder: Path) -> Trainer:
    from distill_core.building import build
    from distill_core.training.loop import Trainer
    from distill_core.training.run_folder import Run

    method, source = build(recipe, context)
    return Trainer(method, source, recipe, Run(folder))


def conversion_rows(found: dict[str, Any]) -> list[list[Any]]:
    """A line for each curve's end, and what follows from them."""
    rows: list[list[Any]] = [
        [title, float(found["curves"][name][-1][0]), float(found["curves"][name][-1][1]), ""]
        for name, title in TITLES.items()
    ]
    ends: dict[str, Any] = conclusions(found["curves"])
    reached, faster = ends["converted_seconds"], ends["times_faster"]
    verdict = "not reached" if reached is None else f"{faster:.3g} x sooner"
    held = _word(faster is not None and faster >= FASTER)
    what = f"MLP from the teacher at least as good as from images ({verdict}, asked {FASTER:g})"
    rows.append([what, "" if reached is None else float(reached), float(ends["from_images_psnr"]), held])
    later = ends["with_grid_seconds_to_converted_psnr"]
    if later is not None:
        times = later / ends["converted_total_seconds"]
        what = f"MLP from images with grid as good as the converted one ({times:.3g} x later)"
        rows.append([what, float(later), float(ends["converted_psnr"]), ""])
    return rows


def stage_rows(found: dict[str, Any]) -> list[list[Any]]:
    """PVD's stages against pixels alone."""
    titles = {
        "staged": "by stages",
        "pixels": "by pixels alone, with the teacher's block 2",
        "pixels_own_colors": "by pixels alone, block 2 its own",
    }
    rows: list[list[Any]] = []
    for name, title in titles.items():
        seconds, psnr = found[name]
        gain = found["staged"][1] - psnr
        held = "" if name == "staged" else f"{gain:.3g} dB less, asked {GAIN_DB:g}: {_word(gain >= GAIN_DB)}"
        rows.append([title, float(seconds), float(psnr), held])
    return rows


def _word(holds: bool) -> str:
    return "PASS" if holds else "below"


def save_plot(found: dict[str, Any], path: Path) -> None:
    """PSNR against seconds of training, of every field."""
    from distillery_cli.stack.demo_report import pyplot_without_display

    pyplot = pyplot_without_display()
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, title in TITLES.items():
        axis.plot(*zip(*found["curves"][name], strict=True), marker=".", label=title)
    axis.axhline(found["curves"]["mlp_from_images"][-1][1], color="grey", linewidth=0.8, linestyle="--")
    axis.set(
        title=found["scene"],
        xlabel="CPU seconds of training, one thread",
        ylabel="PSNR on true pictures, dB",
        xscale="log",
    )
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""What a renderer skips, and what gRPC costs: a trained field, rendered densely, with its grid, and by the sampler."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery_cli.stack.demo import stack_settings
from distillery_cli.stack.up import Stack

if TYPE_CHECKING:
    from torch import Tensor

    from distill_core.radiance.cameras.camera import Camera
    from distill_core.radiance.scenes.scene import Scene
    from distillery_sampler.client import SamplerClient

RECIPE, SCENE = "nerf_procedural", "procedural-scene"
STEPS = 700
SIDE = 128  # pixels of a view
VIEWS, TRIES = 3, 3  # that are rendered densely, which takes seconds each; the best of the tries counts
ROUNDS = 3
FIRST_SIZES = (128, 256, 512, 1024)
SPEEDUP, MAX_LOSS, SHARE, FIRST_MS = 15.0, 0.1, 0.9, 100.0  # what is wanted


def measure_radiance(state: Path, seconds: float, say: Callable[[str], object]) -> dict[str, Any]:
    """Dense against sparse rendering, the sampler against the bare renderer, and the wait for a first picture."""
    settings = stack_settings(state)
    say(f"{RECIPE}: training {STEPS} steps")
    folder, ref = _trained(settings.store_url, state)
    from distill_core.radiance.scenes.scene import load_scene, refined

    scene = refined(load_scene(folder))
    say("dense rendering against grid and early stop")
    report: dict[str, Any] = {"sparse": measure_sparse(scene)}
    with Stack(settings) as stack:
        stack.start()
        from distillery_sampler.client import SamplerClient

        with SamplerClient(settings.sampler_address) as sampler:
            say(f"sampler against bare renderer, {ROUNDS} x {seconds:g} s each")
            report["served"] = measure_served(scene, sampler, ref, seconds)
            report["first"] = [measure_first(sampler, ref, side) for side in FIRST_SIZES]
    return report


def _trained(store_url: str, state: Path) -> tuple[Path, str]:
    """A field's folder, and its reference in the store."""
    from distill_core import api
    from distill_core.recipe import load_recipe

    recipe = load_recipe(RECIPE, {"steps": STEPS})
    result = api.train(recipe, state / "run", api.context(store_url, state / "cache"))
    assert result.manifest is not None
    return state / "run" / "model", result.manifest.ref


def measure_sparse(scene: Scene) -> dict[str, float]:
    """Times of the same views at equal samples along the ray, and PSNR against the closed form, on one thread."""
    import torch

    from distill_core.metrics.image import psnr
    from distill_core.radiance.analytic.procedural import render_procedural
    from distill_core.radiance.rendering.quadrature import over
    from distill_core.radiance.scenes.scene import render

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took: dict[str, list[float]] = {"dense": [], "sparse": []}
    quality: dict[str, list[float]] = {"dense": [], "sparse": []}
    ways: dict[str, Callable[[Scene, Camera], Tensor]] = {
        "dense": render_densely,
        "sparse": lambda scene, view: render(scene, view).rgb,
    }
    try:
        for view in _views(scene, VIEWS):
            truth = render_procedural(view)
            target = over(truth[..., :3], truth[..., 3:], torch.tensor(scene.spec.background))
            for name, way in ways.items():
                tries = []
                for _ in range(TRIES):
                    began = time.perf_counter()
                    picture = way(scene, view)
                    tries.append(time.perf_counter() - began)
                took[name].append(min(tries))
                quality[name].append(psnr(picture.numpy(), target.numpy()))
    finally:
        torch.set_num_threads(threads)
    dense, sparse = (sum(took[name]) / VIEWS for name in ways)
    lost = (sum(quality["dense"]) - sum(quality["sparse"])) / VIEWS
    return {
        "num_steps": scene.num_steps,
        "occupied": float(scene.occupied.float().mean()),
        "dense_s": dense,
        "sparse_s": sparse,
        "speedup": dense / sparse,
        "psnr": sum(quality["sparse"]) / VIEWS,
        "psnr_loss": lost,
    }


def render_densely(scene: Scene, camera: Camera) -> Tensor:
    """The picture (H, W, 3) from every sample inside the box, all of a ray's at once."""
    import torch

    from distill_core.radiance.rendering.march import march
    from distill_core.radiance.scenes.scene import SceneLimits, bands, develop, render_samples

    parts = []
    with torch.inference_mode():
        for rows in bands(camera.width, camera.height, SceneLimits().chunk_rays):
            rays = camera.rays(rows)
            samples = march(rays, bound=scene.spec.bound, num_steps=scene.num_steps, occupied=None)
            parts.append(render_samples(scene.field, rays, samples))
        return develop(scene, torch.cat(parts), camera.width).rgb


def measure_served(scene: Scene, sampler: SamplerClient, ref: str, seconds: float) -> dict[str, float]:
    """Views per second of the bare renderer, a thread a core, and of a path over gRPC, turn and turn about."""
    import torch

    from distill_core.radiance.scenes.scene import render

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    views = _views(scene, 24)
    options: dict[str, Any] = {"elevation": 20.0, "width": SIDE, "height": SIDE, "image_format": "RAW_U8"}
    next(iter(sampler.render_path(ref, count=1, **options)))  # load the model

    def bare(until: float) -> int:
        frames = 0
        while time.perf_counter() < until:
            render(scene, views[frames % len(views)])
            frames += 1
        return frames

    counts, spent = {"bare": 0, "served": 0}, {"bare": 0.0, "served": 0.0}
    try:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            with ThreadPoolExecutor(cores) as pool:
                counts["bare"] += sum(pool.map(bare, [began + seconds] * cores))
            spent["bare"] += time.perf_counter() - began
            began = time.perf_counter()
            while time.perf_counter() < began + seconds:
                counts["served"] += sum(1 for _ in sampler.render_path(ref, count=len(views), **options))
            spent["served"] += time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    rates = {name: counts[name] / spent[name] for name in counts}
    return {
        "bare_fps": rates["bare"],
        "served_fps": rates["served"],
        "ratio": rates["served"] / rates["bare"],
    }


def measure_first(sampler: SamplerClient, ref: str, side: int) -> dict[str, float]:
    """Milliseconds until a progressive view's first picture and until its last, the best of a few."""
    first, last = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        stages = sampler.render_progressive(ref, width=side, height=side, image_format="RAW_U8")
        next(stages)
        first.append(1000 * (time.perf_counter() - began))
        for _ in stages:
            pass
        last.append(1000 * (time.perf_counter() - began))
    return {"side": side, "first_ms": min(first), "last_ms": min(last)}


def _views(scene: Scene, count: int) -> list[Camera]:
    """An orbit at 20 degrees of elevation, as the sampler's."""
    from distill_core.radiance.cameras.camera import orbit_camera

    spec = scene.spec
    return [
        orbit_camera(
            360 * index / count, 20, spec.radius, fov_degrees=spec.fov_degrees, width=SIDE, height=SIDE
        )
        for index in range(count)
    ]


def rendering_rows(report: dict[str, Any]) -> list[list[Any]]:
    """Rows for `COLUMNS`: what, figure, what is wanted, verdict."""
    sparse, served = report["sparse"], report["served"]

    def row(what: str, figure: float, wanted: str, held: bool) -> list[Any]:
        return [what, float(figure), wanted, "PASS" if held else "short"]

    rows = [
        row(
            f"grid and early stop over dense, {sparse['num_steps']} samples a ray, times as fast",
            sparse["speedup"],
            f"at least {SPEEDUP:g}",
            sparse["speedup"] >= SPEEDUP,
        ),
        row(
            "PSNR lost by it, dB",
            sparse["psnr_loss"],
            f"at most {MAX_LOSS:g}",
            sparse["psnr_loss"] <= MAX_LOSS,
        ),
        row(
            f"gRPC over bare renderer, views of {SIDE} x {SIDE} a second",
            served["ratio"],
            f"at least {SHARE:g}",
            served["ratio"] >= SHARE,
        ),
    ]
    return rows + [
        row(
            f"first picture of {first['side']} x {first['side']}, ms (last: {first['last_ms']:.0f})",
            first["first_ms"],
            f"at most {FIRST_MS:g}",
            first["first_ms"] <= FIRST_MS,
        )
        for first in report["first"]
    ]


COLUMNS = ["rendering", "measured", "wanted", ""]

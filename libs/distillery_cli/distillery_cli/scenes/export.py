"""`distillery export-scene`: fields and Gaussians as files that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillery_cli.terminal.output import AsJson, StoreUrl, emit_json, results, waiting


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        "export-scene",
        epilog="Examples: distillery export-scene procedural-scene --to mesh.glb  ·  "
        "distillery export-scene procedural-splats --to splats.ply  ·  "
        "distillery export-scene scan.ply --to views/ --cameras transforms.json",
    )(export_scene)


def export_scene(
    scene: Annotated[str, typer.Argument(help="name@version, a model folder, or splats in a .ply file.")],
    to: Annotated[
        Path,
        typer.Option(help="mesh.glb, .obj or .ply of a field; .ply of Gaussians; or a folder for pictures."),
    ],
    cameras: Annotated[
        Path | None, typer.Option(help="Pictures: a transforms.json with the cameras; unset: an orbit.")
    ] = None,
    views: Annotated[int, typer.Option(help="Pictures: how many of the orbit.")] = 40,
    size: Annotated[int, typer.Option(help="Pictures: pixels per side.")] = 256,
    resolution: Annotated[int, typer.Option(help="Mesh: cells along a side of the scene's box.")] = 192,
    threshold: Annotated[float, typer.Option(help="Mesh: density of the surface, 1/scene unit.")] = 10.0,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write a scene as a mesh, as splats, or as pictures with cameras, in the frame of its input."""
    with waiting(f"exporting {scene}"):
        from distill_core import api
        from distill_core.radiance.export.scene import export_scene as export
        from distill_core.radiance.export.scene import import_splats
        from distillery_cli.training.train import local_context

        splats = Path(scene).suffix.lower() == ".ply"
        loaded = import_splats(Path(scene)) if splats else api.load(scene, local_context(store))
        sizes = {"views": views, "size": size, "resolution": resolution, "threshold": threshold}
        files = export(loaded, to, cameras=cameras, **sizes)  # type: ignore[arg-type]
    if as_json:
        return emit_json({"files": [str(file) for file in files]})
    return results.print("\n".join(map(str, files)))

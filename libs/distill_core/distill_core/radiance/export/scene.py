"""Exports of a scene by the file's name: a mesh, splats, or a data set.

| scene | file | becomes |
| --- | --- | --- |
| field | .glb .obj .ply | mesh with vertex colours |
| Gaussians | .ply | splats, as 3DGS writes them |
| either | a folder (no suffix) | pictures with transforms.json |
"""

from __future__ import annotations

from pathlib import Path

import torch

from distill_core.artifacts import SceneSpec
from distill_core.errors import ArtifactError, ConfigError
from distill_core.radiance.export import mesh
from distill_core.radiance.export.dataset import orbit_cameras, read_cameras, save_dataset
from distill_core.radiance.export.frame import from_input
from distill_core.radiance.export.splats import load_splats, moved, save_splats
from distill_core.radiance.scenes.gaussians import GaussianScene
from distill_core.radiance.scenes.scene import Scene

CORE = 0.95  # share of the Gaussians per axis and side that an imported scene's box is made for
VIEW_DISTANCE = 2.5  # from the centre of an imported scene, in half sides of its box


def export_scene(
    scene: object,
    to: Path,
    *,
    cameras: Path | None = None,
    views: int = 40,
    size: int = 256,
    resolution: int = mesh.RESOLUTION,
    threshold: float = mesh.THRESHOLD,
) -> list[Path]:
    """Write `scene` to `to` in the input's frame, as its suffix says; the files that a person would open.

    `cameras` (a transforms.json) or else `views` of `size` pixels a side are for data sets, the rest for meshes.

    Raises:
        ConfigError: a file that this kind of scene does not become, or sizes out of range.
        ArtifactError: not a scene.
    """
    if not isinstance(scene, Scene | GaussianScene):
        raise ArtifactError(
            "only scenes, fields and Gaussians, can be exported as such; `distillery models` shows them"
        )
    suffix = to.suffix.lower()
    if not suffix:
        if views < 1 or not 1 <= size <= 8192:
            raise ConfigError(
                f"{views} views of {size} pixels are not possible; give at least 1 of each", field="views"
            )
        chosen = (
            orbit_cameras(scene.spec, views, size) if cameras is None else read_cameras(cameras, scene.spec)
        )
        save_dataset(scene, to, chosen)
        return [to / "transforms.json"]
    if isinstance(scene, GaussianScene):
        if suffix != ".ply":
            raise ConfigError(f"Gaussians become .ply files or a folder of pictures, not {to}", field="to")
        save_splats(scene, to)
    elif suffix not in mesh.SUFFIXES:
        raise ConfigError(f"a field becomes {', '.join(mesh.SUFFIXES)} or a folder, not {to}", field="to")
    else:
        mesh.save_mesh(mesh.mesh_of(scene, resolution=resolution, threshold=threshold), to)
    return [to]


def import_splats(path: Path) -> GaussianScene:
    """The Gaussians of a 3DGS PLY file, moved into the box [-1, 1]^3 around most of them."""
    gaussians = load_splats(path)
    ordered = gaussians.means.double().sort(dim=0).values  # torch's quantile refuses 16 million and more
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (1 - CORE, CORE))
    half = max(float((high - low).max()) / 2, 1e-6)
    transform = torch.eye(4, dtype=torch.float64) / half
    transform[:3, 3], transform[3, 3] = -(low + high) / 2 / half, 1
    spec = SceneSpec(
        field="gaussians", bound=1.0, radius=VIEW_DISTANCE, transform=tuple(transform.flatten().tolist())
    )
    return GaussianScene(moved(gaussians, from_input(spec)), spec)

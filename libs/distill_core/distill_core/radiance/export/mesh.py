"""A field's surface as a mesh: where the density passes a threshold (marching cubes), coloured by block 2.

Block 2 is asked along d = -normal, as a camera right in front of each vertex sees it. The volume is evaluated in
slabs and only in occupied cells; level and volume are logarithms, in which a density is closest to linear.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distill_core.errors import ConfigError, DataError, missing_package
from distill_core.radiance.export.frame import to_input
from distill_core.radiance.rendering.occupancy import is_occupied
from distill_core.radiance.scenes.scene import Scene

if TYPE_CHECKING:
    import trimesh

THRESHOLD = 10.0  # 1/scene unit
RESOLUTION = 192  # cells along a side of the box
MIN_COMPONENT = 0.02  # of the largest component's faces; smaller ones are dust
SPAN = 5.0  # log-density further than this from the level says no more than "inside" or "outside"
CHUNK = 2**18  # points at once
SUFFIXES = (".glb", ".obj", ".ply")


@torch.no_grad()
def log_density_volume(scene: Scene, resolution: int) -> Tensor:
    """Log-density (n, n, n) at the corners of `resolution` cells a side, n = resolution + 1; -inf where unoccupied."""
    side = torch.linspace(-scene.spec.bound, scene.spec.bound, resolution + 1)
    volume = torch.full((len(side),) * 3, -math.inf)
    thick = max(1, CHUNK // len(side) ** 2)
    for first in range(0, len(side), thick):
        slab = torch.stack(torch.meshgrid(side[first : first + thick], side, side, indexing="ij"), -1)
        positions = slab.reshape(-1, 3).to(scene.occupied.device)
        kept = is_occupied(scene.occupied, positions, scene.spec.bound).nonzero().squeeze(-1)
        values = torch.full((len(positions),), -math.inf)
        if len(kept):
            values[kept.cpu()] = scene.field.log_density(positions[kept]).float().cpu()
        volume[first : first + thick] = values.reshape(slab.shape[:3])
    return volume


def mesh_of(
    scene: Scene,
    *,
    resolution: int = RESOLUTION,
    threshold: float = THRESHOLD,
    min_component: float = MIN_COMPONENT,
) -> trimesh.Trimesh:
    """The surface at density `threshold`, with vertex colours, in the input's frame.

    Raises:
        ConfigError: a resolution below 2 or a threshold that is not positive.
        DataError: the density reaches the threshold nowhere.
    """
    if resolution < 2 or not 0 < threshold < math.inf:
        raise ConfigError(
            f"a mesh of resolution {resolution} at density {threshold} is not possible; give at least 2 cells and "
            "a positive density",
            field="resolution" if resolution < 2 else "threshold",
        )
    vertices, faces = _marched(log_density_volume(scene, resolution), math.log(threshold), scene.spec.bound)
    mesh = _without_dust(_trimesh().Trimesh(vertices, faces, process=False), min_component)
    normals = torch.from_numpy(np.array(mesh.vertex_normals, dtype=np.float32))
    inside = torch.from_numpy(np.array(mesh.vertices, dtype=np.float32))
    visual: Any = mesh.visual  # ColorVisuals, since no texture was given
    visual.vertex_colors = (colours(scene, inside, -normals) * 255).round().byte().numpy()
    mesh.vertices = to_input(scene.spec).points(torch.from_numpy(np.array(mesh.vertices))).numpy()
    return mesh


def save_mesh(mesh: trimesh.Trimesh, path: Path) -> None:
    """Write `mesh` as .glb, .obj or .ply.

    Raises:
        ConfigError: another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} is not a mesh file; end it in {', '.join(SUFFIXES)}", field="to")
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(path)


@torch.no_grad()
def colours(scene: Scene, positions: Tensor, directions: Tensor) -> Tensor:
    """Colours (M, 3) in [0, 1] at `positions` seen along `directions`, both (M, 3), on the CPU."""
    device, parts = scene.occupied.device, []
    for first in range(0, len(positions), CHUNK):
        chunk = slice(first, first + CHUNK)
        _, radiance = scene.field(positions[chunk].to(device), directions[chunk].to(device))
        if radiance.shape[-1] != 3:
            raise ConfigError(
                f"the field has {radiance.shape[-1]} channels, a latent and no colours; export one of 3 channels"
            )
        parts.append(radiance.clamp(0, 1).cpu())
    return torch.cat(parts)


def _marched(volume: Tensor, level: float, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) in the box and faces (F, 3), turned outwards; closed, also where the box cuts it."""
    from skimage.measure import marching_cubes

    cell = 2 * bound / (volume.shape[0] - 1)
    bounded = volume.sub(level).clamp(-SPAN, SPAN)
    if not bool((bounded > 0).any()):
        raise DataError(
            f"the density reaches {math.exp(level):g} nowhere, so there is no surface; lower the threshold",
            field="threshold",
        )
    padded = torch.nn.functional.pad(bounded, (1,) * 6, value=-SPAN).numpy()
    vertices, faces, _, _ = marching_cubes(  # type: ignore[no-untyped-call]
        padded, 0.0, spacing=(cell,) * 3, gradient_direction="ascent"
    )
    return vertices - (bound + cell), faces


def _without_dust(mesh: trimesh.Trimesh, share: float) -> trimesh.Trimesh:
    """The components with at least `share` of the largest one's faces."""
    labels = _trimesh().graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    counts = np.bincount(labels)
    mesh.update_faces((counts >= share * counts.max())[labels])
    mesh.remove_unreferenced_vertices()
    return mesh


def _trimesh() -> ModuleType:
    try:
        import trimesh
    except ImportError:
        raise missing_package("trimesh", "export") from None
    return trimesh

"""A scene that can be looked at: a field with its occupied cells, on disk and through a camera."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.artifacts import SceneSpec
from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.field.card import Card
from distill_core.networks.fields import RadianceField, build_field
from distill_core.probe import VIEW_DEGREES, VIEW_SIDE
from distill_core.radiance.cameras.camera import Camera, Rays, orbit_camera
from distill_core.radiance.rendering.march import step_length
from distill_core.radiance.rendering.occupancy import MIN_OPACITY
from distill_core.radiance.rendering.quadrature import over, render_weights
from distill_core.radiance.rendering.segments import render_samples, render_tiles
from distill_core.radiance.scenes.storage import WEIGHTS, fill, read_description, read_tensors, write_scene
from distill_core.recipe.tables import NetworkConfig

REFINED, MAX_FACTOR = 128, 4  # cells a side of a refined grid, and of one cell at most
MAX_CHANGE = 0.025  # of a pixel's colour, and of its opacity, by a refined grid
CHUNK_POINTS = 8192  # of a refined grid's, evaluated at once


class RenderStopped(Exception):
    """`should_stop` said so; there is no picture."""


class SceneLimits(Config):
    """Limits of one rendering: its pixels, and the rays in memory at once."""

    max_pixels: int = Field(2**21, ge=1)
    chunk_rays: int = Field(4096, ge=1)


class SceneFile(Config):
    """Content of a field's config.json."""

    kind: Literal["field"] = "field"
    version: Literal[1] = 1
    network: NetworkConfig
    scene: SceneSpec
    num_steps: int = Field(ge=1, le=4096)  # samples along the box's diagonal
    grid_resolution: int = Field(ge=2, le=256)


@dataclass(frozen=True, eq=False)
class Scene:
    """A field, where it is occupied (G, G, G), and how finely it is marched.

    `field` maps (positions, directions), both (M, 3), to density (M,) and radiance (M, 3).
    """

    kind: ClassVar[str] = "field"
    field: RadianceField
    occupied: Tensor
    spec: SceneSpec
    num_steps: int

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(scene=self.spec)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        save_scene(self, folder)


class Rendering(NamedTuple):
    """A picture, the expected distance of each pixel (0 where empty), its opacity and, if asked for, its normal.

    The normal is the weighted sum of the samples' normals, world axes, as long as the pixel is opaque.
    """

    rgb: Tensor  # (H, W, 3), in [0, 1]
    depth: Tensor  # (H, W), scene units
    opacity: Tensor  # (H, W), in [0, 1]
    normal: Tensor | None = None  # (H, W, 3)


def save_scene(scene: Scene, folder: Path) -> None:
    """Write config.json and model.safetensors. The field must be one that `build_field` knows."""
    assert isinstance(scene.field, RadianceField), "only trained kinds of field can be saved"
    described = SceneFile(
        network=NetworkConfig(name=scene.field.kind, args=scene.field.config.model_dump(mode="json")),
        scene=scene.spec,
        num_steps=scene.num_steps,
        grid_resolution=len(scene.occupied),
    )
    tensors = {f"field.{name}": value for name, value in scene.field.state_dict().items()}
    write_scene(folder, described, tensors | {"occupied": scene.occupied})


def load_scene(folder: Path, *, device: str | torch.device = "cpu") -> Scene:
    """The scene that `save_scene` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights are of another field.
    """
    described, field = read_description(folder, SceneFile, _field_of, what="a radiance field")
    tensors = read_tensors(folder)
    size = described.grid_resolution
    occupied = tensors.pop("occupied", None)
    if occupied is None or occupied.shape != (size, size, size) or occupied.dtype != torch.bool:
        raise ArtifactError(
            f"{folder / WEIGHTS} holds no occupancy grid of {size} cells per side; publish it again"
        )
    fill(field, {name.removeprefix("field."): value for name, value in tensors.items()}, folder)
    return Scene(
        field.to(device).eval().requires_grad_(False),
        occupied.to(device),
        described.scene,
        described.num_steps,
    )


@torch.no_grad()
def refined(scene: Scene) -> Scene:
    """The same scene with smaller cells, up to 128 a side: those in which, or beside which, the field is dense.

    Thinner than one cell of the result, and thinner than training looked for, is what may be lost. Where that shows,
    as in a field that is fog all over after a few steps, the scene stays as it is.
    """
    factor = min(REFINED // len(scene.occupied), MAX_FACTOR)
    if factor < 2 or not scene.occupied.any():
        return scene
    bound, size = scene.spec.bound, len(scene.occupied) * factor
    inside = scene.occupied
    for axis in range(3):
        inside = inside.repeat_interleave(factor, axis)
    cells = inside.nonzero()
    centres = (cells + 0.5) * (2 * bound / size) - bound
    seen = [scene.field.log_density(part).exp() for part in centres.split(CHUNK_POINTS)]
    density = torch.zeros(inside.shape, device=inside.device)
    density[tuple(cells.T)] = torch.cat(seen).float()
    least = -math.log1p(-MIN_OPACITY) / step_length(bound, scene.num_steps)
    dense = density > min(float(density.mean()), least)  # as training's grid has it: thin fog stays
    beside = nn.functional.max_pool3d(dense[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    finer = replace(scene, occupied=beside & inside)
    return finer if _look_alike(scene, finer) else scene


def parity_view(spec: SceneSpec) -> Camera:
    """The small view of a scene that its manifest's image probe is of."""
    return orbit_camera(
        VIEW_DEGREES,
        VIEW_DEGREES,
        spec.radius,
        fov_degrees=spec.fov_degrees,
        width=VIEW_SIDE,
        height=VIEW_SIDE,
    )


def _look_alike(one: Scene, other: Scene) -> bool:
    """Whether the view that servers compare is the same in both, by `MAX_CHANGE` of colour and of opacity."""
    rays = [parity_view(one.spec).rays(range(VIEW_SIDE))]
    seen = [render_rays(scene, rays)[0] for scene in (one, other)]
    *colour, _depth, opacity = (seen[0] - seen[1]).abs().amax(0)
    return float(max(*colour, opacity)) <= MAX_CHANGE


def _field_of(file: SceneFile) -> RadianceField:
    return build_field(file.network, file.scene.bound)


@torch.no_grad()
def render(
    scene: Scene,
    camera: Camera,
    *,
    background: tuple[float, float, float] | None = None,
    normals: bool = False,
    should_stop: Callable[[], bool] | None = None,
    limits: SceneLimits | None = None,
) -> Rendering:
    """The scene through `camera`, over `background` (unset: the scene's own). Deterministic.

    Raises:
        ConfigError: more pixels than `limits` allow, a background outside [0, 1], a field not of colours.
        RenderStopped: `should_stop()`, asked between bands of rows, was true.
    """
    limits = limits or SceneLimits()
    if camera.width * camera.height > limits.max_pixels:
        raise ConfigError(
            f"a picture of {camera.width} x {camera.height} is too large; "
            f"at most {limits.max_pixels} pixels are allowed",
            field="width",
        )
    check_background(background)
    parts = []
    for rows in bands(camera.width, camera.height, limits.chunk_rays):
        if should_stop is not None and should_stop():
            raise RenderStopped
        parts += render_rays(scene, [camera.rays(rows)], normals=normals)
    return develop(scene, torch.cat(parts), camera.width, background)


def bands(width: int, height: int, chunk_rays: int) -> list[range]:
    """The rows of a picture in runs of at most `chunk_rays` pixels, never less than one row."""
    rows = max(1, chunk_rays // width)
    return [range(first, min(first + rows, height)) for first in range(0, height, rows)]


def render_rays(scene: Scene, tiles: Sequence[Rays], *, normals: bool = False) -> list[Tensor]:
    """`render_tiles` of the scene's field, for fields of any number of channels."""
    device = scene.occupied.device
    moved = [Rays(tile.origins.to(device), tile.directions.to(device)) for tile in tiles]
    return render_tiles(
        scene.field,
        moved,
        bound=scene.spec.bound,
        num_steps=scene.num_steps,
        occupied=scene.occupied,
        normals=normals,
    )


def develop(
    scene: Scene, rays: Tensor, width: int, background: tuple[float, float, float] | None = None
) -> Rendering:
    """The picture, `width` pixels wide, of rendered rays (R, 5), or (R, 8) with normals.

    Raises:
        ConfigError: the field composites other than 3 colours.
    """
    if rays.shape[-1] not in (5, 8):
        raise ConfigError(
            f"the field has {rays.shape[-1] - 2} channels, a latent and no picture; render fields of 3 channels",
            field="channels",
        )
    colour = rays.new_tensor(scene.spec.background if background is None else background)
    out = rays.reshape(-1, width, rays.shape[-1])
    opacity = out[..., 4:5]
    rgb = over(out[..., :3], opacity, colour).clamp(0, 1)
    opacity = opacity.clamp(0, 1)
    normal = nn.functional.normalize(out[..., 5:], dim=-1) * opacity if out.shape[-1] == 8 else None
    return Rendering(rgb, out[..., 3], opacity[..., 0], normal)


def check_background(background: Sequence[float] | None) -> None:
    """Raise `ConfigError` unless it is a colour, or not given."""
    if background is not None and (len(background) != 3 or not all(0 <= value <= 1 for value in background)):
        raise ConfigError(
            f"background {tuple(background)} is not a colour; give three values in [0, 1]", field="background"
        )


__all__ = [
    "RenderStopped",
    "Rendering",
    "Scene",
    "SceneLimits",
    "bands",
    "develop",
    "load_scene",
    "parity_view",
    "refined",
    "render",
    "render_rays",
    "render_samples",
    "render_weights",
    "save_scene",
]

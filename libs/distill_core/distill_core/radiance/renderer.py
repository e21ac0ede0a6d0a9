"""A scene that can be looked at: a field with its occupied cells, on disk and through a camera."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_core.artifacts import SceneSpec
from distill_core.config import Config, NetworkConfig
from distill_core.errors import ArtifactError, ConfigError
from distill_core.networks.fields import RadianceField, build_field
from distill_core.radiance.cameras import Camera, Rays
from distill_core.radiance.march import Samples, march
from distill_core.radiance.rendering import composite, over, packed_weights, render_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
STOP_TRANSMITTANCE = 1e-4  # a ray with less light left is finished
SEGMENT = 12  # samples per ray between two looks at what is left


class RenderStopped(Exception):
    """`should_stop` said so; there is no picture."""


class SceneLimits(Config):
    """What one call may ask for, and how much of it is in memory at once."""

    max_pixels: int = Field(2**21, ge=1)
    chunk_rays: int = Field(4096, ge=1)


class SceneFile(Config):
    """What config.json of a field's folder says."""

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

    field: nn.Module
    occupied: Tensor
    spec: SceneSpec
    num_steps: int


class Rendering(NamedTuple):
    """A picture, the expected distance of each pixel (0 where empty) and its opacity."""

    rgb: Tensor  # (H, W, 3), in [0, 1]
    depth: Tensor  # (H, W), scene units
    opacity: Tensor  # (H, W), in [0, 1]


def save_scene(scene: Scene, folder: Path) -> None:
    """Write config.json and model.safetensors. The field must be one that `build_field` knows."""
    assert isinstance(scene.field, RadianceField), "only trained kinds of field can be saved"
    folder.mkdir(parents=True, exist_ok=True)
    described = SceneFile(
        network=NetworkConfig(name=scene.field.kind, args=scene.field.config.model_dump(mode="json")),
        scene=scene.spec,
        num_steps=scene.num_steps,
        grid_resolution=len(scene.occupied),
    )
    tensors = {f"field.{name}": value.contiguous() for name, value in scene.field.state_dict().items()}
    save_file(tensors | {"occupied": scene.occupied.contiguous()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(described.model_dump_json(indent=1), encoding="utf-8")


def load_scene(folder: Path, *, device: str | torch.device = "cpu") -> Scene:
    """The scene that `save_scene` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights are of another field.
    """
    described, field = _read_description(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS)
    size = described.grid_resolution
    occupied = tensors.pop("occupied", None)
    if occupied is None or occupied.shape != (size, size, size) or occupied.dtype != torch.bool:
        raise ArtifactError(
            f"{folder / WEIGHTS} holds no occupancy grid of {size} cells per side; publish it again"
        )
    try:
        field.load_state_dict(
            {name.removeprefix("field."): value for name, value in tensors.items()}, strict=True
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"{folder / WEIGHTS} is not the field that {CONFIG} describes: {reason}"
        ) from None
    if not all(bool(torch.isfinite(value).all()) for value in field.state_dict().values()):
        raise ArtifactError(f"{folder / WEIGHTS} holds NaN or infinity; train the field again")
    return Scene(
        field.to(device).eval().requires_grad_(False),
        occupied.to(device),
        described.scene,
        described.num_steps,
    )


def _read_description(path: Path) -> tuple[SceneFile, RadianceField]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        described = SceneFile.parse(values if isinstance(values, dict) else {})
        return described, build_field(described.network, described.scene.bound)
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path} does not describe a radiance field: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is missing or damaged: {error}") from None


@torch.no_grad()
def render(
    scene: Scene,
    camera: Camera,
    *,
    background: tuple[float, float, float] | None = None,
    should_stop: Callable[[], bool] | None = None,
    limits: SceneLimits | None = None,
) -> Rendering:
    """The scene through `camera`, over `background` (unset: the scene's own). Deterministic.

    Raises:
        ConfigError: more pixels than `limits` allow, or a background outside [0, 1].
        RenderStopped: `should_stop()`, asked between chunks of rays, was true.
    """
    limits = limits or SceneLimits()
    if camera.width * camera.height > limits.max_pixels:
        raise ConfigError(
            f"a picture of {camera.width} x {camera.height} is too large; "
            f"at most {limits.max_pixels} pixels are allowed",
            field="width",
        )
    colour = scene.spec.background if background is None else background
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ConfigError(
            f"background {tuple(colour)} is not a colour; give three values in [0, 1]", field="background"
        )
    device = scene.occupied.device
    origins, directions = (part.to(device) for part in camera.rays())
    parts = []
    for first in range(0, len(origins), limits.chunk_rays):
        if should_stop is not None and should_stop():
            raise RenderStopped
        chunk = slice(first, first + limits.chunk_rays)
        parts.append(_render_rays(scene, Rays(origins[chunk], directions[chunk])))
    out = torch.cat(parts).reshape(camera.height, camera.width, 5)
    rgb = over(out[..., :3], out[..., 4:], torch.tensor(colour, device=device)).clamp(0, 1)
    return Rendering(rgb, out[..., 3], out[..., 4].clamp(0, 1))


def render_samples(field: nn.Module, rays: Rays, samples: Samples) -> Tensor:
    """Colour, distance and opacity (R, 5) of each ray from all its samples at once; with gradients."""
    density, radiance = field(samples.positions, rays.directions[samples.ray])
    weights = packed_weights(density, samples)
    channels = torch.cat([radiance, samples.distance[:, None], torch.ones_like(weights)[:, None]], -1)
    return composite(weights, channels, samples)


def _render_rays(scene: Scene, rays: Rays) -> Tensor:
    """`render_samples` in segments along the rays, without those that no light passes any more."""
    samples = march(rays, bound=scene.spec.bound, num_steps=scene.num_steps, occupied=scene.occupied)
    out = torch.zeros(samples.num_rays, 5, device=rays.origins.device)
    light = torch.ones(samples.num_rays, device=rays.origins.device)
    longest = int(samples.rank.max()) + 1 if len(samples.rank) else 0
    for first in range(0, longest, SEGMENT):
        wanted = (
            (samples.rank >= first)
            & (samples.rank < first + SEGMENT)
            & (light[samples.ray] > STOP_TRANSMITTANCE)
        )
        kept = wanted.nonzero().squeeze(-1)
        if len(kept) == 0:
            break
        positions, distance, ray, rank = (value[kept] for value in samples[:4])
        segment = Samples(positions, distance, ray, rank - first, samples.delta, samples.num_rays)
        passed = render_samples(scene.field, rays, segment)
        out += light[:, None] * passed
        light = light * (1 - passed[:, 4])
    return out


__all__ = [
    "RenderStopped",
    "Rendering",
    "Scene",
    "SceneLimits",
    "load_scene",
    "render",
    "render_samples",
    "render_weights",
    "save_scene",
]

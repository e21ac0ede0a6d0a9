"""A scene that can be put under another light: geometry and radiance of a field, materials, light, progress."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.artifacts import SceneSpec
from distill_core.config import Config
from distill_core.kinds.field.card import Card
from distill_core.networks.fields import RadianceField, build_field
from distill_core.networks.materials import MaterialConfig, MaterialField
from distill_core.radiance.cameras.camera import Camera, Rays
from distill_core.radiance.light.environment import EnvironmentLight
from distill_core.radiance.light.shading import GBuffer, blend_progress, physical
from distill_core.radiance.rendering.march import Samples, march
from distill_core.radiance.rendering.quadrature import composite, over, packed_weights
from distill_core.radiance.scenes.storage import fill, read_description, read_tensors, write_scene
from distill_core.recipe.tables import NetworkConfig

KIND = "relightable"
MIN_WEIGHT = 5e-3  # of a sample on its ray, to count
FRONT = 0.1
Moving = Literal["field", "materials"]
CHUNK = 4096  # rays rendered at once


class RelightableFile(Config):
    """Content of a relightable scene's config.json."""

    kind: Literal["relightable"] = "relightable"
    version: Literal[1] = 1
    network: NetworkConfig  # of the field with geometry and raw radiance
    materials: MaterialConfig
    scene: SceneSpec
    num_steps: int = Field(ge=1, le=4096)
    grid_resolution: int = Field(ge=2, le=256)
    environment_height: int = Field(ge=2, le=32)


class RelightableScene(nn.Module):
    """Geometry and raw radiance of a field, materials by position, and the light they were seen under."""

    kind: ClassVar[str] = "relightable"
    occupied: Tensor

    def __init__(
        self,
        raw: RadianceField,
        materials: MaterialField,
        light: EnvironmentLight,
        *,
        occupied: Tensor,
        spec: SceneSpec,
        num_steps: int,
    ) -> None:
        super().__init__()
        self.raw, self.materials, self.light = raw, materials, light
        self.spec, self.num_steps = spec, num_steps
        self.register_buffer("occupied", occupied.clone())

    @torch.no_grad()
    def march(self, rays: Rays, offset: Tensor | float = 0.5) -> Samples:
        """Samples along the rays where they are still lit and something is (Instant-NGP's early stop)."""
        samples = march(
            rays, bound=self.spec.bound, num_steps=self.num_steps, occupied=self.occupied, offset=offset
        )
        weights = packed_weights(self.raw.log_density(samples.positions).exp(), samples)
        return visible(samples, weights > MIN_WEIGHT)

    def buffer(self, rays: Rays, samples: Samples, *, moving: Moving | None = None) -> GBuffer:
        """G-buffer of the rays; with gradients into the field and the materials, or into the one that is `moving`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and moving != "materials"):
            density, radiance = self.raw(samples.positions, rays.directions[samples.ray])
            weights = packed_weights(density, samples)
        with torch.set_grad_enabled(torch.is_grad_enabled() and moving != "field"):
            materials = self.materials(samples.positions)
        single = [materials.roughness, materials.metallic, materials.alpha, torch.ones_like(weights)]
        columns = torch.stack(single, -1)
        channels = torch.cat([radiance, materials.albedo, materials.normal, columns], -1)
        out = composite(weights, channels, samples)
        opacity = out[:, -1]
        seen = out[:, 3:-1] / opacity.clamp_min(1e-6)[:, None]
        roughness, metallic, alpha = seen[:, 6:].unbind(-1)
        normal = F.normalize(seen[:, 3:6], dim=-1)
        distance = front_distance(weights.detach(), samples)
        return GBuffer(out[:, :3], seen[:, :3], roughness, metallic, alpha, normal, opacity, distance)

    def compose(self, buffer: GBuffer, directions: Tensor, background: Tensor) -> Tensor:
        """I (R, 3): raw and physical radiance over `background` (..., 3), blended by alpha."""
        opacity = buffer.opacity[:, None]
        phy = physical(buffer, directions, self.light) * opacity
        return blend_progress(
            buffer.alpha, over(phy, opacity, background), over(buffer.raw, opacity, background)
        )

    @torch.no_grad()
    def render(self, camera: Camera) -> tuple[Tensor, GBuffer]:
        """The picture (H, W, 3) through `camera` over the scene's background, and what its rays (H W) see."""
        rays = Rays(*(part.to(self.occupied.device) for part in camera.rays()))
        background = torch.tensor(self.spec.background, device=self.occupied.device)
        pictures, buffers = [], []
        for origins, directions in zip(rays.origins.split(CHUNK), rays.directions.split(CHUNK)):
            chunk = Rays(origins, directions)
            buffers.append(self.buffer(chunk, self.march(chunk)))
            pictures.append(self.compose(buffers[-1], directions, background))
        picture = torch.cat(pictures).reshape(camera.height, camera.width, 3).clamp(0, 1)
        return picture, GBuffer(*(torch.cat(parts) for parts in zip(*buffers)))

    def relight(self, environment: EnvironmentLight | Tensor) -> RelightableScene:
        """The scene under `environment`, (H, 2H, 3) linear radiance or a light; what is not light is shared.

        Where alpha < 1, that share of the raw radiance stays as it was seen: as light that the scene itself gives.
        """
        relit = copy.copy(self)
        relit._modules = dict(self._modules)
        relit.light = EnvironmentLight.of(environment).to(self.occupied.device).requires_grad_(False)
        return relit

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(scene=self.spec)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        described = RelightableFile(
            network=NetworkConfig(name=self.raw.kind, args=self.raw.config.model_dump(mode="json")),
            materials=self.materials.config,
            scene=self.spec,
            num_steps=self.num_steps,
            grid_resolution=len(self.occupied),
            environment_height=len(self.light.log_radiance),
        )
        write_scene(folder, described, self.state_dict())


def front_distance(weights: Tensor, samples: Samples) -> Tensor:
    """Distance (R,) at which a ray has given FRONT of its light to the scene; 0 where it never does.

    Of a mirror a field makes a window: what it reflects is set deep inside, so the mean distance is no surface.
    """
    out = torch.zeros(samples.num_rays, device=weights.device)
    if len(weights) == 0:
        return out
    dense = weights.new_zeros(samples.num_rays, int(samples.rank.max()) + 1)
    dense[samples.ray, samples.rank] = weights
    passed = dense.cumsum(-1)[samples.ray, samples.rank]
    first = (passed >= FRONT) & (passed - weights < FRONT)
    out[samples.ray[first]] = samples.distance[first]
    return out


def visible(samples: Samples, kept: Tensor) -> Samples:
    """The samples that are `kept` (M,) bool."""
    positions, distance, ray = (value[kept] for value in samples[:3])
    counts = torch.bincount(ray, minlength=samples.num_rays)
    rank = torch.arange(len(ray), device=ray.device) - (counts.cumsum(0) - counts)[ray]
    return Samples(positions, distance, ray, rank, samples.delta, samples.num_rays)


def load_relightable(folder: Path, *, device: str | torch.device = "cpu") -> RelightableScene:
    """The scene that `RelightableScene.save` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights are of another scene.
    """

    def made(file: RelightableFile) -> RelightableScene:
        return RelightableScene(
            build_field(file.network, file.scene.bound),
            MaterialField(file.materials, file.scene.bound),
            EnvironmentLight(file.environment_height),
            occupied=torch.zeros((file.grid_resolution,) * 3, dtype=torch.bool),
            spec=file.scene,
            num_steps=file.num_steps,
        )

    _, scene = read_description(folder, RelightableFile, made, what="a relightable scene")
    fill(scene, read_tensors(folder), folder)
    return scene.to(device).eval().requires_grad_(False)

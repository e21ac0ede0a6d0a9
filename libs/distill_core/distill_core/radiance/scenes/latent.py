"""A scene in a latent space: a field of latents, rendered by rays through latent pixels, refined and then decoded.

    Zhat = sum_i T_i alpha_i z_i + (1 - opacity) Z_background,     z = F(Zhat),     picture = Dec(z)

A latent pixel is `factor` pixels wide, so the intrinsics are divided by it. Latents have any sign: the output is
linear, and its background is the encoded background.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.artifacts import SceneSpec
from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.kinds.field.card import Card
from distill_core.networks.fields import RadianceField, build_field
from distill_core.networks.refinement import RefinementConfig, RefinementHead
from distill_core.radiance.cameras.camera import Camera, Rays
from distill_core.radiance.rendering.march import Samples, march
from distill_core.radiance.rendering.quadrature import composite, over, packed_weights
from distill_core.radiance.scenes.storage import fill, read_description, read_tensors, write_scene
from distill_core.recipe.tables import NetworkConfig

Box = tuple[float, float, float, float, float, float]  # least x, y, z, then greatest; scene units


class LatentFile(Config):
    """Content of a latent scene's config.json."""

    kind: Literal["latent_field"] = "latent_field"
    version: Literal[1] = 1
    network: NetworkConfig
    head: RefinementConfig
    scene: SceneSpec
    num_steps: int = Field(ge=1, le=4096)
    grid_resolution: int = Field(ge=2, le=256)
    size: tuple[int, int, int]  # (C, h, w) of the latents


class LatentScene(nn.Module):
    """A field of latents and its refinement head; `occupied` (G, G, G), `background` (C, h, w) are buffers."""

    kind: ClassVar[str] = "latent_field"
    occupied: Tensor
    background: Tensor

    def __init__(
        self,
        field: RadianceField,
        head: RefinementHead,
        *,
        occupied: Tensor,
        background: Tensor,
        spec: SceneSpec,
        num_steps: int,
    ) -> None:
        super().__init__()
        self.field, self.head, self.spec, self.num_steps = field, head, spec, num_steps
        self.register_buffer("occupied", occupied)
        self.register_buffer("background", background)
        self.decoders: list[Callable[[Tensor], Tensor]] = []  # of a loaded scene, outside the module tree
        self._companions: tuple[Any, ...] = ()

    def decoded_by(self, model: Any) -> LatentScene:
        """The scene, read and saved with the picture decoder of a latent model."""
        self.decoders, self._companions = [model.decode], (model,)
        return self

    def march(self, rays: Rays, offset: Tensor | float = 0.5) -> Samples:
        """Samples along the rays."""
        return march(
            rays, bound=self.spec.bound, num_steps=self.num_steps, occupied=self.occupied, offset=offset
        )

    def render(self, rays: Rays, samples: Samples) -> Tensor:
        """Zhat (B, C, h, w) of B views' rays (B h w, ...), one view after the other; with gradients."""
        density, latents = self.field(samples.positions, rays.directions[samples.ray])
        weights = packed_weights(density, samples)
        out = composite(weights, torch.cat([latents, torch.ones_like(weights)[:, None]], -1), samples)
        maps = out.unflatten(0, (-1, *self.background.shape[1:])).permute(0, 3, 1, 2)
        return over(maps[:, :-1], maps[:, -1:], self.background)

    @torch.no_grad()
    def inside(self, box: Box, rays: Rays, samples: Samples) -> Tensor:
        """Mask (B, 1, h, w): 1 where most of what a ray sees lies in `box`."""
        low, high = samples.positions.new_tensor(box).split(3)
        within = ((samples.positions >= low) & (samples.positions <= high)).all(-1).float()
        weights = packed_weights(self.field.log_density(samples.positions).exp(), samples)
        seen = composite(weights, within[:, None], samples)
        share: Tensor = seen.unflatten(0, (-1, *self.background.shape[1:]))
        return (share > 0.5).permute(0, 3, 1, 2).float()

    @torch.no_grad()
    def latents(self, camera: Camera) -> Tensor:
        """Z (1, C, h, w) through a camera of the picture's own size."""
        rays = latent_rays([camera], self.background.shape)
        rays = Rays(*(part.to(self.background.device) for part in rays))
        latents: Tensor = self.head(self.render(rays, self.march(rays)))
        return latents

    @torch.no_grad()
    def picture(self, camera: Camera, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The picture (H, W, 3) in [0, 1] through `camera`; `decode` None is that of the loaded scene."""
        latents = self.latents(camera)
        for decoder in [decode] if decode else self.decoders:
            latents = decoder(latents)
        return latents[0].float().clamp(-1, 1).permute(1, 2, 0) / 2 + 0.5

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(scene=self.spec)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, and beside them the decoder, as vae/, if there is one."""
        described = LatentFile(
            network=NetworkConfig(name=self.field.kind, args=self.field.config.model_dump(mode="json")),
            head=self.head.config,
            scene=self.spec,
            num_steps=self.num_steps,
            grid_resolution=len(self.occupied),
            size=tuple(self.background.shape),
        )
        write_scene(folder, described, self.state_dict())
        for model in self._companions:
            if hasattr(model, "save_companions"):
                model.save_companions(folder)


def latent_rays(cameras: Sequence[Camera], size: Sequence[int]) -> Rays:
    """Rays (B h w) through the centres of the latent pixels (C, h, w) of each camera's picture.

    Raises:
        ConfigError: a lens with distortion, which latents of neighbouring pixels do not share.
    """
    small = []
    for camera in cameras:
        if camera.distortion or camera.fisheye:
            raise ConfigError("latents need pinhole cameras; undistort the capture first", field="data")
        x, y = size[2] / camera.width, size[1] / camera.height
        focal = (camera.fx * x, camera.fy * y, camera.cx * x, camera.cy * y)
        small.append(Camera(camera.c2w, *focal, size[2], size[1]).rays())
    return Rays(*(torch.cat(parts) for parts in zip(*small)))


def load_latent_scene(folder: Path, *, device: str | torch.device = "cpu") -> LatentScene:
    """The scene that `LatentScene.save` wrote, with the decoder in its vae/ if there is one.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights are of another scene.
    """
    from distill_core.networks.diffusers_codec import decode_latent
    from distill_core.networks.diffusers_io import load_companions

    def made(file: LatentFile) -> LatentScene:
        return LatentScene(
            build_field(file.network, file.scene.bound),
            RefinementHead(file.head, file.size[0]),
            occupied=torch.zeros((file.grid_resolution,) * 3, dtype=torch.bool),
            background=torch.zeros(file.size),
            spec=file.scene,
            num_steps=file.num_steps,
        )

    file, scene = read_description(folder, LatentFile, made, what="a latent scene")
    fill(scene, read_tensors(folder), folder)
    codec = load_companions(folder, device=device)["codec"]
    if codec is not None:
        scene.decoders = [functools.partial(decode_latent, codec)]
    elif file.size[0] != 3:
        raise ArtifactError(f"{folder} lacks vae/, the decoder of its latents; publish it again")
    return scene.to(device).eval().requires_grad_(False)
